"""``-align``: how far AH over IPv4 is filled up, from the text to the SA and back."""

import pytest

from ipsecq.errors import SadError
from ipsecq.sa.validate import validate
from ipsecq.setkey import parser
from ipsecq.setkey.printer import config_sa

AH = "add 192.0.2.1 192.0.2.2 ah 0x1000 -m transport -r 8{} -A hmac-sha2-256 0x" + "5a" * 32 + ";"
ESP = "add 192.0.2.1 192.0.2.2 esp 0x1000{} -E aes-gcm-16 0x" + "5a" * 20 + ";"


def added(text):
    (command,) = parser.parse(text)
    return command.sa


@pytest.mark.parametrize("align", [0, 4, 8])
def test_the_alignment_of_ah_survives_being_printed_and_read_again(align):
    sa = added(AH.format(f" -align {align}" if align else ""))
    validate(sa)
    assert sa.ah_align == align
    assert added(config_sa(sa)).ah_align == align
    assert ("-align" in config_sa(sa)) == bool(align)


@pytest.mark.parametrize("text", [AH.format(" -align 6"), AH.format(" -align 2"), ESP.format(" -align 8")])
def test_an_alignment_that_means_nothing_is_refused(text):
    with pytest.raises(SadError, match="use 4 or 8, and for ah only"):
        validate(added(text))
