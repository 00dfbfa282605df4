.PHONY: check format test slow bench

check:  ## what must be clean before a commit
	ruff check .
	ruff format --check .
	mypy --strict src

format:  ## mend what can be mended by machine
	ruff check --fix .
	ruff format .

test:  ## the default tests, under 3 minutes on 2 cores
	pytest

slow:  ## the tests that take minutes
	pytest -m slow --timeout=1800

bench:  ## a first look at speed and memory; PEERS=FOLDER (benchmarks/peers.sh) measures others too
	vitrine bench --quick $(if $(PEERS),--peers $(PEERS))
