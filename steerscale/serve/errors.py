"""What is wrong with a request, in the form OpenAI's interface has for it."""

from typing import Any

from steerscale.errors import SteerscaleError


class RequestError(SteerscaleError):
    """A request that gets an error for an answer."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        type: str = "invalid_request_error",
    ) -> None:
        """`param`: the field that is wrong; `code`: for programs; `status`: of HTTP."""
        super().__init__(message)
        self.status, self.param, self.code, self.type = status, param, code, type

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def overloaded(message: str) -> RequestError:
    """Not the client's fault; it may try again."""
    return RequestError(message, status=503, type="server_error", code="overloaded")
