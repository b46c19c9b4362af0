"""`python -m deepseek`."""

from deepseek.cli.main import main

main()
