"""Owns which URLs are accepted as data and how they are shown: schemes, credentials, words. Opens nothing.

Imports the standard library only: the command line asks it before anything heavy is loaded.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

from dist_kd.errors import ConfigError

WEB = ("http", "https")

# scheme -> the package that opens it; "" comes with dist_kd. Schemes that run code, reach into other processes or
# wrap another file system (python, github, dask, jupyter, zip, reference, cached, ...) have no row: their content could
# choose what else is opened. sftp has none because fsspec takes any host key.
STORES: dict[str, str] = {
    "s3": "dist-kd[s3]",
    "s3a": "dist-kd[s3]",
    "gs": "dist-kd[gs]",
    "gcs": "dist-kd[gs]",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "oss": "ossfs",
    "oci": "ocifs",
    "webhdfs": "",
    "ftp": "",
    "memory": "",
}
CONTAINER_AT_ACCOUNT = ("az", "abfs", "abfss")  # abfs://container@account.dfs.core.windows.net/path names no user

SECRET_WORDS = ("signature", "signed", "token", "key", "credential", "passw", "secret", "x-amz-", "x-goog-")
SECRET_NAMES = ("sig", "auth", "authorization", "jwt", "pwd")
REMEDY = (
    "URLs are printed, logged and saved with the run, so give the credentials outside of them: ~/.netrc for http(s), "
    "the environment for stores (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN)"
)

_SCHEME = re.compile(r"[\s{]*([a-zA-Z][a-zA-Z0-9+.-]*):(//|:.*://)?")
_COMMA = re.compile(r",(?![^{]*\})")  # outside braces


def is_remote(where: str) -> bool:
    """Whether any URL of a comma-separated list has a scheme other than `file:`."""
    return any(scheme not in ("", "file") for scheme in map(_scheme, _COMMA.split(where)))


def _scheme(where: str) -> str:
    """The scheme in small letters; "" of a path, which may well hold a colon."""
    match = _SCHEME.match(where)
    if not match:
        return ""
    scheme = match[1].lower()
    return scheme if match[2] or scheme in ("pipe", "file", *WEB, *STORES) else ""


def scheme_of(url: str) -> str:
    """`s3` of `s3://bucket/a.tar`; "" of a path."""
    return _scheme(url)


def local_path(where: str) -> str:
    """The path a `file:` URL stands for; anything else as it is. ConfigError for one of another host."""
    if _scheme(where) != "file":
        return where
    parts = urlsplit(where.strip())
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"`{shown(where)}` names the host `{parts.hostname}`, but file: URLs are of this machine only"
        )
    return unquote(parts.path)


def shown(url: str) -> str:
    """The URL as messages may show it: without user, password, query and fragment."""
    return re.sub(r"[?#].*", "", re.sub(r"//[^/?#]*@", "//", url), flags=re.DOTALL)


def check_no_credentials(text: str) -> None:
    """Nothing, if no URL in `text` carries a credential. The ConfigError leaves it out: all settings are saved."""
    for url in re.findall(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s,]*", text):
        _check_one_for_credentials(url)


def check_url(where: str) -> None:
    """Nothing, if every URL of a comma-separated list may be opened. Paths and file: URLs are passed over.

    ConfigError for an unknown scheme, a pipe, a chain of schemes, and for credentials, which the message leaves out.
    """
    for url in _COMMA.split(where):
        if is_remote(url):
            _check_one(url.strip())


def _check_one(url: str) -> None:
    scheme = _scheme(url)
    if url.startswith("{"):
        raise ConfigError(
            "data has braces around whole URLs; write the URLs one after another, with commas between them"
        )
    if scheme == "pipe":
        raise ConfigError("data given as `pipe:` would run a command, which dist_kd never does; name the shards by URL")
    if "::" in re.sub(r"\[[^\]]*\]", "", url):  # brackets hold IPv6 addresses
        raise ConfigError(
            "data is a chain of URLs (`::`), but shards are opened by one plain URL such as s3://BUCKET/KEY"
        )
    if scheme not in (*WEB, *STORES):
        known = ", ".join(("file", *WEB, *STORES))
        raise ConfigError(
            f"data has the scheme `{scheme}:`, which is not one of {known}; copy the shards to one of these"
        )
    _check_one_for_credentials(url)
    if not urlsplit(url).netloc or "//" not in url[: len(scheme) + 3]:
        raise ConfigError(f"`{shown(url)}` names no host or bucket; a URL is like `{scheme}://NAME/PATH/a-0000.tar`")


def _check_one_for_credentials(url: str) -> None:
    scheme = url.partition(":")[0].lower()
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # the text of a bad port may be the half of a password
        raise ConfigError(f"a `{scheme}:` URL has a host or port that cannot be read; {REMEDY}") from None
    if "@" in parts.netloc and (scheme not in CONTAINER_AT_ACCOUNT or ":" in parts.netloc.split("@")[0]):
        raise ConfigError(f"the URL of `{parts.hostname}` carries a user name or a password; {REMEDY}")
    for name, _ in parse_qsl(f"{parts.query}&{parts.fragment}".replace(";", "&"), keep_blank_values=True):
        low = name.lower()
        if low in SECRET_NAMES or any(word in low for word in SECRET_WORDS):
            raise ConfigError(f"the URL `{shown(url)}` carries a credential in its query; {REMEDY}")
