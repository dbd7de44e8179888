"""`/sign-in` of the servers of `make up`: a link by which a browser knows the key from then on. Holds no key.

Prefect's page reads its key from the browser's storage, under a name of Prefect's own; the link carries the key behind `#`, which no
browser sends. MLflow's is asked for by HTTP Basic, so that the link carries it in front of the host, and leads to an address without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["PATH", "links", "mlflow", "prefect"]

PATH = "/sign-in"
_PAGE = """<!doctype html><meta charset="utf-8"><title>Sign in</title><p id="said">Signing in ...</p><script>
const key = btoa(decodeURIComponent(location.hash.slice(1)));
history.replaceState(null, "", location.pathname);
fetch("/api/admin/version", {headers: {Authorization: "Basic " + key}}).then((answer) => {
  if (answer.ok) { localStorage.setItem("prefect-password", key); location.replace("/"); }
  else document.getElementById("said").textContent = "The key of this link is not the server's. `make up` prints the present link.";
});
</script>"""


def links(variables: Mapping[str, str]) -> tuple[str, str]:
    """Return the addresses that sign a browser in to Prefect and to MLflow. They hold the keys: show them to the user alone."""
    prefect, (scheme, host) = variables["PREFECT_API_URL"].removesuffix("/api"), variables["MLFLOW_TRACKING_URI"].split("://")
    user, key = variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"]
    return f"{prefect}{PATH}#{variables['PREFECT_API_AUTH_STRING']}", f"{scheme}://{user}:{key}@{host}{PATH}"


def prefect(app: ASGIApp) -> ASGIApp:
    """Return Prefect's application with the page that stores the key in the browser, once Prefect has accepted it."""
    return _with_page(app, lambda _: HTMLResponse(_PAGE, headers={"Cache-Control": "no-store"}))


def mlflow(app: ASGIApp) -> ASGIApp:
    """Return MLflow's application with a redirect to an absolute address: pages whose own holds a key may not fetch anything."""
    return _with_page(app, lambda request: RedirectResponse(f"http://{request.headers['host']}/", 303))


def _with_page(app: ASGIApp, page: Callable[[Request], Response]) -> ASGIApp:
    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        own = scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "GET"
        await (page(Request(scope)) if own else app)(scope, receive, send)

    return whole
