"""`python -m kvfold` is the `kvfold` command.

For machines where the installed script is not on the path. It holds nothing of its own and knows nothing of the
verbs; see `cli/main.py` for those.
"""

from kvfold.cli.main import main

if __name__ == "__main__":  # worker processes read this file too
    main()
