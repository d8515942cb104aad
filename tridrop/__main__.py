"""``python -m tridrop`` is the command ``tridrop``."""

from .cli import main

raise SystemExit(main())
