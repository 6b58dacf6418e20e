# `make demo` and `make test` each set up what they need; nothing else is required on Debian or Ubuntu.
.PHONY: demo test quick proof storm images check lint format clean

demo:
	@.ci/setup demo
	.venv/bin/python jobs/demo.py

test: check # two at once, on two cores: what shares a Ray, which waits more than it computes, and beside it the rest
	$(call beside,$(PYTEST) -m 'not cluster and not proof',$(PYTEST) -m 'cluster and not proof')

quick: lint # 90 s on two cores: what is decided in one process, and beside it types, one kill, one rollout and one resume
	$(call beside,.venv/bin/mypy && .venv/bin/python -m pytest -q -m quick $$(grep -l mark.quick tests/test_*.py), \
		.venv/bin/python -m pytest -q -m 'not quick and not slow and not proof' \
		$(addprefix --ignore=tests/test_,$(addsuffix .py,$(HEAVY))))

PYTEST = .venv/bin/python -m pytest $(addprefix --ignore=,$(READERS))

define beside
@mkdir -p .pytest_cache; ($(1)) >.pytest_cache/beside.log 2>&1 & beside=$$!; \
	$(2); one=$$?; wait $$beside; two=$$?; cat .pytest_cache/beside.log; exit $$((one | two))
endef

HEAVY = attention bench_denoiser bench_scheduler bench_tables checkpoint doctor driver_pool gpu_lock guard \
	hunyuan_video15 hunyuan_video15_i2v hunyuan_video15_options kuberay lora ltx2 memory models_maker options \
	parity plan pool qwen_image qwen_image_edit qwen_image_edit_plus report schedulers sockets ti2v tiles tiny \
	transfer vace vace_inputs video

proof: # replicas, drivers and nodes that die, stages that stay up, two hosts, Prometheus: half an hour
	@.ci/setup test
	$(call beside,$(PYTEST) $(LIMIT) -m 'proof and not cluster',$(PYTEST) $(LIMIT) -m 'proof and cluster')

LIMIT = $(if $(MINUTES),--minutes $(MINUTES))

storm: # by hand: a thousand requests of a batch and of a service while everything is struck; some twenty minutes, as root
	@.ci/setup test
	.venv/bin/python tests/storm.py batch outputs/storm_batch
	.venv/bin/python tests/storm.py service outputs/storm_service

images: # by hand: builds the container images and runs docker/README.md's lines; needs Docker
	docker/test.sh cpu

lint:
	@.ci/setup test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

check: lint
	$(call beside,.venv/bin/mypy,.venv/bin/python -m pytest -q $(READERS))

READERS = $(patsubst %,tests/test_%.py,architecture conf_comments docker families imports keys) # tests that read the repository: names, documents

format:
	@.ci/setup test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv outputs build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
