"""From wherever the records are to a federation on disk.

`fetch_data` leaves the data file, or a pointer to it, with its origin; `write_partition`
deals the records to clients; `Federation` reads that partition back. Each step checks the
sha256 of what the step before it left.
"""

from __future__ import annotations

import os

# Read by the hub's libraries when they are imported: a fetch says nothing about its user.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
