"""What lies in this folder is importable by its own name once the folder is on sys.path."""
