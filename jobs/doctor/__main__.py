"""python -m jobs.doctor"""

from jobs.doctor.command import main

if __name__ == "__main__":
    raise SystemExit(main())
