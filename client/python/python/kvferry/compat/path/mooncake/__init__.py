"""`mooncake.engine` by kvferry. Everything else comes from an installed `mooncake`, if there is one."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
