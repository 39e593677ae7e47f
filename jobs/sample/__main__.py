"""python -m jobs.sample"""

from jobs.sample.command import main

if __name__ == "__main__":
    raise SystemExit(main())
