"""``python -m tridrop`` is the command ``tridrop``."""

from .commands.cli import main

raise SystemExit(main())
