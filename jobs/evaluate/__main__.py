"""python -m jobs.evaluate"""

from jobs.evaluate.command import main

if __name__ == "__main__":
    raise SystemExit(main())
