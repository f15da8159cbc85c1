"""User ids leave preparation as keyed hashes only. Without the key they can be neither read nor guessed."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.core.errors import ConfigError
from dtrain.data.platforms import PrivacyConfig

__all__ = ["KEY_VARIABLE", "UserKey"]

KEY_VARIABLE = "DTRAIN_USER_KEY"
_KEY_BYTES, _LEAST_BYTES = 32, 16
_BLOCK_BYTES = 64  # of SHA-256


@dataclass(frozen=True, slots=True)
class UserKey:
    """A secret key for HMAC-SHA256 (RFC 2104). It is never written into any output; `key_id` may be."""

    secret: bytes = field(repr=False)

    @classmethod
    def load(cls, privacy: PrivacyConfig, env: Mapping[str, str] | None = None) -> UserKey:
        """The key in DTRAIN_USER_KEY (hex), else in the key file, which is made on first use (0600, folder 0700).

        Raises ConfigError for a key that is no hex or too short, and for a key file that others may read.
        """
        env = os.environ if env is None else env
        if KEY_VARIABLE in env:
            return cls(_parse(env[KEY_VARIABLE], f"environment variable {KEY_VARIABLE}"))
        path = Path(privacy.key_file).expanduser()
        try:
            if not path.exists():
                _create(path)
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                raise ConfigError(f"{path}: mode {mode:04o} lets others use the user key; run: chmod 600 {path}")
            return cls(_parse(path.read_text(encoding="ascii", errors="replace"), str(path)))
        except OSError as error:
            raise ConfigError(
                f"{path}: the user key can't be read or made ({type(error).__name__}: {error.strerror}); "
                f"set privacy.key_file to another path, or {KEY_VARIABLE}"
            ) from error

    @property
    def key_id(self) -> str:
        """Tells keys apart without telling the key: 16 hex digits of the HMAC of a constant."""
        return hmac.digest(self.secret, b"dtrain user key id", "sha256").hex()[:16]

    def for_platform(self, name: str, scope: str) -> UserKey:
        """The key of platform `name`: this one with scope "company", one derived from it with scope "platform"."""
        if scope == "company":
            return self
        return UserKey(hmac.digest(self.secret, f"platform:{name}".encode(), "sha256"))

    def hash_ids(self, users: Sequence[str]) -> list[bytes]:
        """First 16 bytes of the HMAC-SHA256 of each user id; written out as 32 hex digits.

        Spelled out after RFC 2104: `hmac.digest` looks OpenSSL's algorithm up each time, and takes four times as long.
        """
        sha256 = hashlib.sha256
        block = self.secret if len(self.secret) <= _BLOCK_BYTES else sha256(self.secret).digest()
        block = block.ljust(_BLOCK_BYTES, b"\0")
        inner, outer = bytes(b ^ 0x36 for b in block), bytes(b ^ 0x5C for b in block)
        return [sha256(outer + sha256(inner + user.encode()).digest()).digest()[:16] for user in users]


def _parse(text: str, where: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        raise ConfigError(f"{where}: is no hexadecimal key; make one with: openssl rand -hex {_KEY_BYTES}") from None
    if len(key) < _LEAST_BYTES:
        raise ConfigError(
            f"{where}: {len(key)} bytes; a key has at least {_LEAST_BYTES}: openssl rand -hex {_KEY_BYTES}"
        )
    return key


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, never replaces the key that another process just made
        except FileExistsError:
            return
    finally:
        temporary.unlink()
