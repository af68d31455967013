# Everything runs in .venv, made here from requirements-dev.txt; nothing else is installed, except
# that `make test` adds Debian's chromium when it runs as root. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-from-requirements-dev
UV := uv==0.13.9
MODEL ?= z_image
WHERE ?= this machine
export COMFYUI_PATH ?= $(CURDIR)/.comfyui
# A package index may be slow, and another program install with apt.
export UV_HTTP_TIMEOUT ?= 300
export UV_HTTP_RETRIES ?= 10
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=5
APT_INSTALL := $(APT) update && $(APT) install -y --no-install-recommends
# A worker for each core, tests/support/groups.py says which tests share one. Whoever has Python
# write no bytecode (containers do) would have every ComfyUI and every rank compile its modules.
TEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

# What tries inputs at random (tests/support/fuzz.py); in `make test`, the same few each time.
FUZZERS := tests/faults/test_fuzz.py tests/parity/test_random.py tests/comfy/test_any_file.py \
	tests/comfy/test_strange_state.py tests/comfy/test_settings_and_flags.py \
	tests/comfy/test_random_graphs.py

.PHONY: help demo serve test test-all soak kills bench bench-comfyui check lint format venv comfyui browser hosts clean

help:
	@echo "make demo     start ComfyUI, compare TP Sampler with the stock sampler, stop"
	@echo "make serve    start ComfyUI with the pack and the same model, until Ctrl-C"
	@echo "              (both: MODEL=z_image, the default, flux, flux2 or qwen_image)"
	@echo "              (demo: WHERE=ray, on a Ray that is started for it)"
	@echo "make test     every test that this machine can run; of what repeats itself, the share that"
	@echo "              the commit chooses (make test-all: all of it)"
	@echo "make soak     a real ComfyUI, random prompts and faults (SOAK_MINUTES=30)"
	@echo "make kills    kill -9 of an engine and of a real ComfyUI at random moments (KILLS=50)"
	@echo "make bench    ms per step on this machine's GPUs (BENCH='--models flux --tp 1 2 ...')"
	@echo "make bench-comfyui  ms per sampler step in ComfyUI, stock and pack (BENCH='--models flux"
	@echo "              --layouts 1x1 2x1 ...')"
	@echo "make check    format, lint, types and the quick tests (what a commit must pass)"
	@echo "make format   let ruff rewrite the code"
	@echo "make venv     only make .venv;  make comfyui: only fetch ComfyUI (or set COMFYUI_PATH)"
	@echo "make clean    remove what these targets made, .venv and .comfyui included"

demo: venv comfyui
	@$(BIN)/python scripts/demo.py --model "$(MODEL)" --where "$(WHERE)"

serve: venv comfyui
	@$(BIN)/python scripts/demo.py --model "$(MODEL)" --serve

test: venv comfyui browser hosts
	$(TEST) --rotate HEAD

test-all: venv comfyui browser hosts
	$(TEST)

soak: venv comfyui
	SOAK_MINUTES=$${SOAK_MINUTES:-30} $(BIN)/python -m pytest tests/faults/test_soak.py -s
	SOAK_MINUTES=$${SOAK_MINUTES:-30} $(BIN)/python -m pytest $(FUZZERS)

kills: venv comfyui
	KILLS=$${KILLS:-50} $(BIN)/python -m pytest tests/faults/test_engine_killed.py \
		tests/faults/test_comfyui_killed.py -s

bench: venv
	$(BIN)/python -m bench.step $(BENCH)

bench-comfyui: venv comfyui
	$(BIN)/python -m bench.in_comfyui $(BENCH)

check: lint comfyui
	$(BIN)/python -m pytest -m "not process and not comfy and not web and not gpu"

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: $(INSTALLED)

$(INSTALLED): requirements-dev.txt
	scripts/make_venv.sh "$(PYTHON)" "$(VENV)"
	$(BIN)/python -m pip install --disable-pip-version-check --retries 10 $(UV)
	$(BIN)/uv pip install --python $(BIN)/python -r requirements-dev.txt
	touch $@

comfyui: venv
	@if [ "$(COMFYUI_PATH)" = "$(CURDIR)/.comfyui" ]; then \
		$(BIN)/python scripts/get_comfyui.py; \
	elif [ ! -f "$(COMFYUI_PATH)/main.py" ]; then \
		echo "COMFYUI_PATH=$(COMFYUI_PATH) is not a ComfyUI: it has no main.py" >&2; exit 1; \
	fi

browser:
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		$(APT_INSTALL) chromium; \
	else \
		echo "No chromium here: the tests marked 'web' are left out (install it to run them)."; \
	fi

hosts:
	@if command -v ip >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		$(APT_INSTALL) iproute2; \
	else \
		echo "No 'ip' here: the tests marked 'hosts' are left out (install iproute2 to run them)."; \
	fi

clean:
	rm -rf $(VENV) .comfyui .frontend out .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
