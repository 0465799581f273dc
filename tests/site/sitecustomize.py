"""Python reads this first in every process of the tests (`make test` puts it on the path).

Garbage is collected less often: while large modules are imported the collector walks what stays, again and again, and
the tests start some hundred processes that do little else.
"""

import gc

gc.set_threshold(200_000, 50, 50)
