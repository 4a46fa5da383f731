"""How to reach and log in to a broker. Secrets stay in `SecretStr`; nothing here may be logged as text."""

from __future__ import annotations

import random
import ssl
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from yarl import URL

from agent.errors import InvalidArgument


class AmqpSettings(BaseModel):
    """A RabbitMQ address, its login and the pace of reconnecting. All times are seconds.

    With `certfile` and no password in the URL the client certificate is the login (SASL EXTERNAL). Give a
    fleet a wide range from `reconnect_min_s` to `reconnect_max_s`, so that it does not return in step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: SecretStr = Field(description="amqp://user:password@host/vhost, or amqps://.")
    auth: Literal["PLAIN", "EXTERNAL"] | None = Field(default=None, description="SASL mechanism; chosen by itself.")
    cafile: Path | None = Field(default=None, description="CA of the broker's certificate.")
    certfile: Path | None = Field(default=None, description="Client certificate; without a password, the login.")
    keyfile: Path | None = Field(default=None, description="Key of the client certificate.")
    heartbeat_s: int = Field(default=10, ge=1, le=600, description="A dead link is noticed after two of these.")
    connect_timeout_s: float = Field(default=10.0, gt=0, description="One attempt to connect.")
    answer_timeout_s: float = Field(default=10.0, gt=0, description="One answer of the broker.")
    reconnect_min_s: float = Field(default=5.0, ge=0, description="Shortest pause before a reconnect.")
    reconnect_max_s: float = Field(default=10.0, ge=0, description="Longest pause; a wide range spreads a fleet.")

    @field_validator("url")
    @classmethod
    def _is_amqp(cls, value: SecretStr) -> SecretStr:
        try:
            url = URL(value.get_secret_value())
            usable = url.scheme in ("amqp", "amqps") and bool(url.host)
        except ValueError:
            usable = False
        if not usable:
            # The text may hold a password, so it is not repeated.
            raise ValueError("the broker's URL must be amqp://host/vhost or amqps://host/vhost")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.reconnect_max_s < self.reconnect_min_s:
            raise ValueError("reconnect_max_s is less than reconnect_min_s")
        if (self.certfile or self.cafile or self.auth == "EXTERNAL") and not self.uses_tls:
            raise ValueError("certificates need an amqps:// URL")
        if self.auth == "EXTERNAL" and not self.certfile:
            raise ValueError("auth EXTERNAL needs a certfile")
        return self

    @property
    def uses_tls(self) -> bool:
        return URL(self.url.get_secret_value()).scheme == "amqps"

    @property
    def mechanism(self) -> str:
        """The SASL mechanism to log in with."""
        if self.auth is not None:
            return self.auth
        has_password = URL(self.url.get_secret_value()).password is not None
        return "EXTERNAL" if self.certfile and not has_password else "PLAIN"

    @property
    def address(self) -> str:
        """Host and port, without login: for logs and errors."""
        url = URL(self.url.get_secret_value())
        return f"{url.host}:{url.port or (5671 if self.uses_tls else 5672)}"

    def connection_url(self, name: str) -> URL:
        """Return the full URL for aiormq. Holds the password: never log it."""
        url = URL(self.url.get_secret_value())
        return url.update_query({"heartbeat": str(self.heartbeat_s), "name": name, "auth": self.mechanism.lower()})

    def reconnect_delay_s(self) -> float:
        """Draw the pause before the next attempt."""
        return random.uniform(self.reconnect_min_s, self.reconnect_max_s)  # noqa: S311 (spreads load)

    def ssl_context(self) -> ssl.SSLContext | None:
        """Load the certificates (reads files: call it in a thread). None without TLS.

        Raises `InvalidArgument` (code `bus_tls`) where a file is missing or is no certificate or key.
        """
        if not self.uses_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=str(self.cafile) if self.cafile else None)
            if self.certfile:
                context.load_cert_chain(self.certfile, self.keyfile)
        except (OSError, ssl.SSLError) as exc:
            reason = exc.strerror or type(exc).__name__
            raise InvalidArgument(
                f"The broker's certificate files cannot be used: {reason}. "
                "Check cafile, certfile and keyfile of the bus.",
                code="bus_tls",
            ) from exc
        return context
