"""Pages to look at and share: one file each, with everything in it, for any browser and without network."""

from mezzotint.cli.page.document import check_page, write_page
from mezzotint.cli.page.many import comparison
from mezzotint.cli.page.one import single

__all__ = ["check_page", "comparison", "single", "write_page"]
