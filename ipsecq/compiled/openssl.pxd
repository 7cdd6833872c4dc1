# What the compiled loops use of OpenSSL's libcrypto (EVP_EncryptInit(3), EVP_CIPHER_CTX_ctrl(3)).

cdef extern from "openssl/evp.h" nogil:
    ctypedef struct EVP_CIPHER_CTX:
        pass
    ctypedef struct EVP_CIPHER:
        pass

    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *context)
    int EVP_CIPHER_CTX_ctrl(EVP_CIPHER_CTX *context, int command, int number, void *pointer)
    int EVP_EncryptInit_ex(EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, void *engine, const unsigned char *key, const unsigned char *iv)
    int EVP_EncryptUpdate(EVP_CIPHER_CTX *context, unsigned char *out, int *length, const unsigned char *data, int count)
    int EVP_EncryptFinal_ex(EVP_CIPHER_CTX *context, unsigned char *out, int *length)
    int EVP_DecryptInit_ex(EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, void *engine, const unsigned char *key, const unsigned char *iv)
    int EVP_DecryptUpdate(EVP_CIPHER_CTX *context, unsigned char *out, int *length, const unsigned char *data, int count)
    int EVP_DecryptFinal_ex(EVP_CIPHER_CTX *context, unsigned char *out, int *length)
    const EVP_CIPHER *EVP_aes_128_gcm()
    const EVP_CIPHER *EVP_aes_192_gcm()
    const EVP_CIPHER *EVP_aes_256_gcm()
    const EVP_CIPHER *EVP_chacha20_poly1305()
    int EVP_CTRL_AEAD_SET_IVLEN
    int EVP_CTRL_AEAD_GET_TAG
    int EVP_CTRL_AEAD_SET_TAG
