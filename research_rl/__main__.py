"""`python -m research_rl`: the same as the `research` command."""

from research_rl.cli import main

raise SystemExit(main())
