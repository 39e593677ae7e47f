"""python -m jobs.info"""

from jobs.info.command import main

if __name__ == "__main__":
    raise SystemExit(main())
