"""Make ``data/wycheproof_*.json`` from a checkout of Project Wycheproof: the groups that ESP and AH can meet.

    python tests/vectors/trim_wycheproof.py PATH-TO-WYCHEPROOF

Kept are nonces of the length that the RFC builds from salt and IV (12 octets, CCM 11), HMAC keys of the registry's
length, and what a test needs of each case.
"""

import json
import sys
from pathlib import Path

FIELDS = ("tcId", "key", "iv", "aad", "msg", "ct", "tag", "result")
FILES = {
    "aes_gcm": {"ivSize": 96},
    "aes_ccm": {"ivSize": 88},
    "chacha20_poly1305": {"ivSize": 96},
    "aes_gmac": {"ivSize": 96},
    "aes_cmac": {"keySize": 128},
    "hmac_sha1": {"keySize": 160, "tagSize": 160},
    "hmac_sha256": {"keySize": 256, "tagSize": 128},
    "hmac_sha384": {"keySize": 384, "tagSize": 192},
    "hmac_sha512": {"keySize": 512, "tagSize": 256},
    "aes_cbc_pkcs5": {},
}


def main() -> None:
    source = Path(sys.argv[1]) / "testvectors_v1"
    for name, wanted in FILES.items():
        groups = json.loads((source / f"{name}_test.json").read_text())["testGroups"]
        cases = [
            {field: case[field] for field in FIELDS if field in case}
            for group in groups
            if all(group[field] == value for field, value in wanted.items())
            for case in group["tests"]
        ]
        target = Path(__file__).parent / "data" / f"wycheproof_{name}.json"
        target.write_text("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")
        print(f"{target.name}: {len(cases)} cases")


if __name__ == "__main__":
    main()
