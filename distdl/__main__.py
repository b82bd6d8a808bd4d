"""`python -m distdl`, for launchers that start a module: torchrun, srun, mpirun."""

from distdl.cli import main

if __name__ == "__main__":
    main()
