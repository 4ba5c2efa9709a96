"""``python -m lightslim`` is the ``lightslim`` command."""

from lightslim.cli import main

raise SystemExit(main())
