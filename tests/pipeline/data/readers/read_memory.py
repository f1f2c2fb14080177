"""Worker of test_text.py: `python -m tests.pipeline.data.readers.read_memory FILE` reads all units of a file.

Prints the lengths of its documents (or why they were rejected), and by how many megabytes the peak memory grew.
"""

import resource
import sys

from pipeline.config.data import Source
from pipeline.data.readers.sources import find_files
from pipeline.data.readers.text import read_unit
from pipeline.data.readers.units import Text, plan_units


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    units = plan_units(find_files([Source(url=sys.argv[1])])[0])
    before = peak()
    items = [item for unit in units for item in read_unit(unit, max_document_bytes=64_000_000)]
    found = [len(item.text) if isinstance(item, Text) else item.reason for item in items]
    print(found, (peak() - before) // 1024)


if __name__ == "__main__":
    main()
