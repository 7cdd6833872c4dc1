"""The grammar of setkey(8): KAME's, FreeBSD's and ipsec-tools', by recursive descent.

    add       [-46n] SRC[PORT] DST[PORT] PROTOCOL SPI [extensions] algorithms ;
    get, delete    [-46n] SRC DST PROTOCOL SPI ;
    deleteall [-46n] SRC DST [PROTOCOL] ;
    flush, dump    [PROTOCOL] ;
    spdadd, spdupdate  [-46n] RANGE[PORT] RANGE[PORT] UPPER [TYPE,CODE] [extensions] -P POLICY ;
    spddelete [-46n] RANGE[PORT] RANGE[PORT] UPPER [TYPE,CODE] -P DIRECTION ;
    spddump ; spdflush ; exit ;

PROTOCOL is esp, ah, ipcomp or esp-udp [ORIGINAL-SRC].  RANGE is an address, ADDRESS/PREFIX, FIRST-LAST or any.  POLICY
is a string of ipsec_set_policy(3) (:mod:`ipsecq.policy.setpolicy`), or begins with *fwd* (:mod:`ipsecq.setkey.forward`).

Extensions of ``add``: -m MODE, -r OCTETS (an eighth of the window in packets), -u REQID, -f PAD, -lh -ls SECONDS,
-bh -bs OCTETS, -esn, -natt OAI[PORT] OAR[PORT], -natt_mtu N and -hwif NAME (read, and without a meaning here).  Ours:
-uh -us SECONDS (from first use), -ah -as PACKETS, -tfc OCTETS, -align OCTETS (of AH), -oai -oar ADDRESS, -rebind; for
policies -lh SECONDS and -fail_open.  What is refused, is refused with its reason: esp-old, ah-old, tcp, -ctx, tagged,
getspi, host names.
"""

from __future__ import annotations

from ipsecq.setkey import commands as c
from ipsecq.setkey.cursor import COMMANDS
from ipsecq.setkey.forward import resolve
from ipsecq.setkey.lexer import Kind
from ipsecq.setkey.policy_rules import PolicyRules
from ipsecq.setkey.sa_rules import SaRules


def parse(text: str, file: str = "") -> list[c.Command]:
    """Parse a configuration; ConfigError with file, line, column and what was expected.  Keys never reach the message.

    ``text`` is decoded with ``surrogateescape`` where a quoted key may hold octets that are no UTF-8.
    """
    return _Parser(text, file).commands()


class _Parser(SaRules, PolicyRules):
    def commands(self) -> list[c.Command]:
        rules = dict(zip(COMMANDS, (
            self.add, self.get, self.delete, self.delete_all, self.flush, self.dump,
            self.spd_add, self.spd_update, self.spd_delete, self.spd_dump, self.spd_flush,
        ), strict=True))  # fmt: skip
        result: list[c.Command] = []
        while self.token.kind is not Kind.END:
            start = self.token
            name = start.text if start.kind is Kind.WORD else ""
            self.family, self.secret = 0, False
            if name in ("exit", "quit", "bye"):
                self.advance()
                self.sign(";")
                result.append(c.Exit(line=start.line, column=start.column))
                break
            if name == "getspi":
                self.error("getspi reserves an SPI for one PF_KEY client only: write the SPI into add", start)
            rule = rules.get(name)
            if rule is None:
                self.fail(f"a command ({', '.join(rules)}, exit)")
            self.advance()
            result += rule(start)
            self.sign(";")
        return resolve(result, self.file)
