"""`python -m ditlab` is `ditlab`."""

from ditlab.cli.main import main

if __name__ == "__main__":
    main()
