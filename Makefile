.PHONY: check format test slow faults fuzz bench

check:  ## what must be clean before a commit
	ruff check .
	ruff format --check .
	mypy

format:  ## mend what can be mended by machine
	ruff check --fix .
	ruff format .

test:  ## the default tests, under 3 minutes on 2 cores
	pytest

slow:  ## the tests that take minutes
	pytest -m slow --timeout=1800

faults:  ## every fault many times, one table; RECORD=records/faults writes it there
	PYTHONPATH=tests:$$PYTHONPATH python -m faults $(if $(RECORD),--record $(RECORD))

fuzz:  ## hostile input, 20,000 cases a target; by coverage where atheris is installed
	PYTHONPATH=tools:$$PYTHONPATH python -m fuzz --cases 20000 --keep output/fuzz

bench:  ## a first look at speed and memory; PEERS=FOLDER (benchmarks/peers.sh) measures others too
	python benchmarks/bench.py --quick $(if $(PEERS),--peers $(PEERS))
