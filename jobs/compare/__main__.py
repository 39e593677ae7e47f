"""python -m jobs.compare"""

from jobs.compare.command import main

if __name__ == "__main__":
    raise SystemExit(main())
