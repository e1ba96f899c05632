"""`python -m shared.store.sweep STORE`: frees what deleted engines have left in a store, once.

What `millrace store sweep` runs. A compile daemon does it by itself for the folder that it works in;
of a bucket nobody does unasked.
"""

import json
import sys
from pathlib import Path

from shared.errors import InvalidField, MillraceError
from shared.log import configure_logging
from shared.settings import SettingsError
from shared.store import LocalStore, open_store
from shared.store.blobs import Sweep


def sweep(url: str) -> Sweep:
    """What was removed from the store at `url`: blobs that nothing needs, a day old at least.

    Raises:
        InvalidField: there is nothing to sweep by that URL.
        StoreUnreachable, StoreRefused, StoreNotFound: it cannot be done.
    """
    # Not at the head: of a folder's sweep it is not needed.
    from shared.store.registry_store import RegistryStore

    path = url.removeprefix("file://")
    if "://" not in path and not (Path(path).expanduser() / "oci-layout").exists():
        # One that is opened is made.
        raise InvalidField(field="store", problem=f"there is none in {path}")
    store = open_store(url)
    if not isinstance(store, LocalStore | RegistryStore):
        raise InvalidField(field="store", problem=f"{url} is swept by the daemon that keeps it")
    return store.sweep()


def main(arguments: list[str]) -> int:
    """Prints what was removed, as JSON; a failure is one line on stderr, as is what was passed over."""
    configure_logging("warning", "auto", "sweep")
    try:
        (url,) = arguments
        swept = sweep(url)
    except (MillraceError, SettingsError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps({"blobs": swept.num_blobs, "bytes": swept.num_bytes}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
