.PHONY: check format test slow docs tutorial faults fuzz bench

check:  ## run before every commit
	ruff check .
	ruff format --check .
	mypy

format:  ## fix what can be fixed automatically
	ruff check --fix .
	ruff format .

test:  ## the default tests, about four minutes on 2 cores
	pytest

slow:  ## the long tests
	pytest -m slow --timeout=1800

docs:  ## build the site into site/html/, with warnings as errors; needs no network
	sphinx-build -q -W --keep-going -c docs . site/html

tutorial:  ## run the tutorial's notebooks and keep their outputs; some minutes
	python docs/tutorial/run.py

faults:  ## inject every fault many times; RECORD=records/faults writes the record
	PYTHONPATH=tests:$$PYTHONPATH python -m faults $(if $(RECORD),--record $(RECORD))

fuzz:  ## fuzz every reader, 20,000 cases per target; guided by coverage if atheris is installed
	PYTHONPATH=tools:$$PYTHONPATH python -m fuzz --cases 20000 --keep output/fuzz

bench:  ## speed and memory, quickly; PEERS=FOLDER (benchmarks/peers.sh) compares other systems
	python benchmarks/bench.py --quick $(if $(PEERS),--peers $(PEERS))
