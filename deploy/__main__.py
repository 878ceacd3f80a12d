"""``python -m deploy`` is ``payfold``, where only the requirements are installed and not the project."""

from deploy.cli import main

if __name__ == "__main__":
    main()
