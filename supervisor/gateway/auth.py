"""Who may come in: tokens (JWT, RFC 7519), single-use tickets for browsers.

A token names one tenant, or every tenant for an admin, and its scopes. No token and no ticket is ever put
into a log, a repr or an error.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

import attrs
import jwt

from supervisor.errors import BadTenantName, ConfigError, NotAllowed, NotAuthenticated, Refused
from supervisor.gateway.heads import BEARER_SUBPROTOCOL
from supervisor.gateway.hosts import host_check
from supervisor.gateway.secret import MIN_SECRET_BYTES
from supervisor.gateway.secret import load_or_create_secret as load_or_create_secret
from supervisor.gateway.tickets import Tickets
from supervisor.tenant.name import check_tenant_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from supervisor.settings import Settings

SCOPES: Final = frozenset({"connect", "execute", "admin"})

_ISSUER: Final = "tenantry"
# It goes on to the agent in a header.
_SUBJECT: Final = re.compile(r"[!-~](?:[ -~]{0,253}[!-~])?")
_COMPACT_JWT: Final = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){2}")
# Another machine's clock, or ours after it was set back, may be this far off.
_SKEW_S: Final = 60.0


@attrs.frozen(kw_only=True)
class Principal:
    """Who asks. `tenant` None means every tenant, and is only for admins. Times are the wall clock's."""

    subject: str
    tenant: str | None
    scopes: frozenset[str]
    issued_at: float
    # When what the principal opened must end (close code 1008); None: never.
    expires_at: float | None
    token_id: str

    def require(self, scope: str, tenant: str | None = None) -> None:
        """Raises NotAllowed unless the principal has the scope for `tenant`; None asks for every tenant.

        `admin` includes the other scopes. The answer for a foreign tenant does not depend on whether it exists.
        """
        if self.tenant is not None and self.tenant != tenant:
            what = "every tenant" if tenant is None else f"tenant {tenant!r}"
            raise NotAllowed(f"this needs a token for {what}; this one is for tenant {self.tenant!r}")
        if scope not in self.scopes and "admin" not in self.scopes:
            raise NotAllowed(f"this needs scope {scope!r}; the token has {' '.join(sorted(self.scopes))}")


_EVERYBODY: Final = Principal(
    subject="anonymous", tenant=None, scopes=SCOPES, issued_at=0.0, expires_at=None, token_id=""
)


class Authenticator:
    """Issues and judges credentials; holds the tickets that are not used yet, and no other state.

    `addresses` are those that are bound. Raises ConfigError if the settings would leave the door open: see
    `host_check`. `wall_clock` gives the time that tokens carry; tickets live by Trio's clock.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        settings: Settings,
        addresses: Sequence[str],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ConfigError(f"the secret has {len(secret)} bytes, and needs at least {MIN_SECRET_BYTES}")
        self._secret = secret
        self._settings = settings
        self._hosts = host_check(settings, addresses)
        self._wall_clock = wall_clock
        self._tickets: Tickets[Principal] = Tickets(settings.auth.ticket_ttl_s)
        self._jwt = jwt.PyJWT()

    @property
    def private(self) -> bool:
        """Whether only this machine reaches us, by bind and by all that the settings say of proxies and names."""
        return self._hosts.private

    @property
    def may_create(self) -> bool:
        """Whether a token for a tenant that does not exist creates it: `tenants.auto_create`, by default on
        loopback only.
        """
        auto_create = self._settings.tenants.auto_create
        return self._hosts.loopback_only if auto_create is None else auto_create

    def now(self) -> float:
        """The wall clock that tokens are judged by, in seconds since 1970."""
        return self._wall_clock()

    # ---- tokens ------------------------------------------------------------------------------------------

    def issue(self, *, tenant: str | None, scopes: Iterable[str], ttl_s: float | None, subject: str) -> str:
        """A new token; without `ttl_s` it does not expire. Raises Refused if there can be no such token."""
        wanted = frozenset(scopes)
        if not wanted or not wanted <= SCOPES:
            raise Refused(f"the scopes of a token are one or more of {', '.join(sorted(SCOPES))}")
        if tenant is None and "admin" not in wanted:
            raise Refused("a token for every tenant has scope 'admin'; name a tenant, or add the scope")
        if tenant is not None:
            check_tenant_name(tenant)
        if ttl_s is not None and not 0 < ttl_s < math.inf:
            raise Refused("the time to live of a token is a number of seconds above 0")
        if not _SUBJECT.fullmatch(subject):
            raise Refused("the subject of a token, who it is for, has 1 to 255 printable ASCII characters")
        issued_at = self._wall_clock()
        claims: dict[str, object] = {
            "iss": _ISSUER,
            "sub": subject,
            "tenant": tenant,
            "scope": " ".join(sorted(wanted)),
            # With its fraction (a NumericDate may have one), so that a revocation cuts exactly.
            "iat": issued_at,
            "jti": secrets.token_urlsafe(12),
        }
        if ttl_s is not None:
            claims["exp"] = issued_at + ttl_s
        return self._jwt.encode(claims, self._secret, algorithm="HS256")

    def verify(self, token: str) -> Principal:
        """Raises NotAuthenticated, with the reason, for whatever is not a valid token of ours."""
        # The decoder skips what is no base64, so that many texts would be the same token.
        if not _COMPACT_JWT.fullmatch(token):
            raise NotAuthenticated("the token is malformed")
        try:
            # PyJWT would ask the system's clock, so the times are judged here.
            claims = self._jwt.decode(
                token,
                self._secret,
                algorithms=["HS256"],
                issuer=_ISSUER,
                options={
                    "require": ["iss", "sub", "iat", "jti"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except jwt.InvalidAudienceError:
            raise NotAuthenticated("the token is meant for another audience") from None
        except jwt.InvalidIssuerError:
            raise NotAuthenticated(f"the token's issuer is not {_ISSUER!r}") from None
        except jwt.InvalidSignatureError:
            raise NotAuthenticated(
                "the token's signature is wrong: it was made with another secret (another state directory?)"
            ) from None
        # RecursionError: JSON with ten thousand brackets in a token that nobody signed.
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise NotAuthenticated("the token is malformed, or no JWT signed with HS256") from None
        return self._principal(claims)

    def _principal(self, claims: dict[str, Any]) -> Principal:
        now = self._wall_clock()
        tenant, scope = claims.get("tenant", ""), claims.get("scope")
        issued_at, expires_at = claims["iat"], claims.get("exp")
        not_before = claims.get("nbf")
        scopes = frozenset(scope.split()) & SCOPES if isinstance(scope, str) else frozenset()
        well_formed = (
            _is_time(issued_at)
            and (expires_at is None or _is_time(expires_at))
            and (not_before is None or _is_time(not_before))
            # Every tenant is `null` in so many words: a claim that somebody forgot opens nothing.
            and (tenant is None or _is_tenant_name(tenant))
            and _SUBJECT.fullmatch(claims["sub"]) is not None
            and bool(scopes)
            and (tenant is not None or "admin" in scopes)
        )
        if not well_formed:
            raise NotAuthenticated("the token's claims are not those of a token that Tenantry issues")
        if expires_at is not None and expires_at <= now:
            raise NotAuthenticated("the token has expired")
        if issued_at > now + _SKEW_S or (not_before is not None and not_before > now + _SKEW_S):
            raise NotAuthenticated("the token is not valid yet: does a clock go wrong?")
        return Principal(
            subject=claims["sub"],
            tenant=tenant,
            scopes=scopes,
            issued_at=float(issued_at),
            expires_at=None if expires_at is None else float(expires_at),
            token_id=claims["jti"],
        )

    def check_not_revoked(self, principal: Principal, tokens_valid_after: float) -> None:
        """Raises NotAuthenticated if the token is one of the tenant's that were revoked.

        A revocation is of a tenant's own tokens: it does not shut out the admin of all tenants who made it.
        """
        if principal.tenant is not None and principal.issued_at <= tokens_valid_after:
            raise NotAuthenticated(f"the tokens of tenant {principal.tenant!r} issued until then were revoked")

    # ---- tickets -----------------------------------------------------------------------------------------

    def issue_ticket(self, principal: Principal, tenant: str) -> tuple[str, float]:
        """A ticket that opens one connection to `tenant`, and for how many seconds it is good.

        A browser cannot send headers with a WebSocket, and a token in a URL ends in logs; a used ticket is
        worth nothing there. Raises NotAllowed, or OverCapacity if too many are unused.
        """
        principal.require("connect", tenant)
        if principal.tenant is None:
            # As if issued now: an admin's own token is no tenant's, what it opens can be revoked with it.
            principal = attrs.evolve(principal, issued_at=self._wall_clock())
        opens = attrs.evolve(principal, tenant=tenant, scopes=frozenset({"connect"}))
        return self._tickets.add(tenant, opens), self._tickets.ttl_s

    def _redeem(self, ticket: str, tenant: str | None) -> Principal:
        principal = self._tickets.take(ticket)
        if principal is None:
            raise NotAuthenticated("the ticket is unknown, used or expired; ask for another one")
        if principal.tenant != tenant:
            raise NotAllowed("the ticket is for another tenant; it is used up now")
        if principal.expires_at is not None and principal.expires_at <= self._wall_clock():
            raise NotAuthenticated("the token that the ticket was made with has expired")
        return principal

    # ---- requests ----------------------------------------------------------------------------------------

    def authenticate(
        self, headers: Iterable[tuple[bytes, bytes]], query: str, *, tenant: str | None, upgrade: bool
    ) -> Principal:
        """Who sends this request. What they may do is for `Principal.require` and `check_not_revoked` to say.

        Taken are `Authorization: Bearer`, and for upgrades also `?token=`, `?ticket=` and the subprotocol
        `tenantry.bearer.<token>`. A ticket must be for `tenant`. Raises NotAuthenticated, also where two
        credentials contradict each other, and NotAllowed for a ticket of another tenant; either way a ticket
        that was looked up is used up.
        """
        if not self._settings.auth.enabled:
            return _EVERYBODY
        tokens, tickets = _bearer_tokens(headers, upgrade=upgrade), set[str]()
        # Whose header says it all is not asked for the rest.
        parsed = _query(query) if upgrade or not tokens else []
        pairs = [pair for pair in parsed if pair[0] in ("token", "ticket")]
        if pairs and not upgrade:
            raise NotAuthenticated(
                "a token or ticket in the URL counts only for WebSockets; send `Authorization: Bearer <token>`"
            )
        if upgrade:
            tokens |= {value for name, value in pairs if name == "token"}
            tickets |= {value for name, value in pairs if name == "ticket"}
        if not tokens and not tickets:
            raise NotAuthenticated("a token is required: send `Authorization: Bearer <token>`")
        if len(tokens) + len(tickets) > 1:
            raise NotAuthenticated("the request has two credentials that are not the same; send one")
        return self._redeem(tickets.pop(), tenant) if tickets else self.verify(tokens.pop())

    def check_host_and_origin(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises HostNotAllowed (421), OriginNotAllowed (403) or Refused (400): see `HostCheck`."""
        self._hosts.check(headers)


def _bearer_tokens(headers: Iterable[tuple[bytes, bytes]], *, upgrade: bool) -> set[str]:
    tokens = set()
    for name, value in headers:
        text = value.decode("latin-1").strip()
        match name.lower():
            case b"authorization":
                scheme, _, token = text.partition(" ")
                if scheme.lower() != "bearer" or not token.strip():
                    raise NotAuthenticated("the Authorization header is not of the form `Bearer <token>`")
                tokens.add(token.strip())
            case b"sec-websocket-protocol" if upgrade:
                offers = [offer.strip() for offer in text.split(",")]
                tokens |= {
                    offer[len(BEARER_SUBPROTOCOL) :] for offer in offers if offer.lower().startswith(BEARER_SUBPROTOCOL)
                }
    return tokens


def _query(query: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query, keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise NotAuthenticated("the URL has more than 100 query values") from None


def _is_tenant_name(value: object) -> bool:
    try:
        return isinstance(value, str) and check_tenant_name(value) == value
    except BadTenantName:
        return False


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
