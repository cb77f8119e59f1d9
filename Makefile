# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
SCENES := .cache/demo/scenes
SHARDS := .cache/demo/shards
TALK := .cache/referential_shards
MEDIA := .cache/media_scenes
MEDIA_SHARDS := .cache/media_shards
DIRECTED := .cache/directed_speech
DIRECTED_SHARDS := .cache/directed_shards
# Where two cores are shared, OpenMP threads that spin while they wait make everything many times slower.
export OMP_WAIT_POLICY := PASSIVE
export KMP_BLOCKTIME := 0
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN | awk '{print ($$1 > 8) ? 8 : $$1}')
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo scenes media-scenes directed-speech test checks docs format golden tiny clean
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/demo
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,dev]'
	touch $@

.venv/speech: .venv/demo
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,speech]'
	touch $@

# Scenes and shards are remade only where they are missing; `make clean` removes them.
$(SHARDS): .venv/demo
	$(BIN)/python data_prep/stamp_scenes.py --out $(SCENES)
	rm -rf $@ $@.partial
	$(BIN)/python data_prep/make_shards.py caption $(SCENES) $@.partial/captions-train --split train
	$(BIN)/python data_prep/make_shards.py caption $(SCENES) $@.partial/captions-test --split test
	$(BIN)/python data_prep/make_shards.py instruct $(SCENES) $@.partial/instruct-train --split train
	mv $@.partial $@

# What configs/demo_full.yaml learns from and checkpoints/demo is scored on.
$(TALK): .venv/demo
	$(BIN)/python data_prep/referential_scenes.py
	rm -rf $@ $@.partial
	set -e; for about in objects:refer one:refer questions:vqa talk:instruct rounds:visdial; do \
	  $(BIN)/python data_prep/make_shards.py $${about#*:} .cache/referential_scenes $@.partial/$${about%:*}-train \
	    --split train --set about=$${about%:*}; done
	set -e; for split in test kinds; do for about in objects:refer things:reg questions:vqa rounds:visdial; do \
	  $(BIN)/python data_prep/make_shards.py $${about#*:} .cache/referential_scenes $@.partial/$${about%:*}-$$split \
	    --split $$split --set about=$${about%:*}; done; done
	mv $@.partial $@

# What configs/demo_speech.yaml and demo_video.yaml learn from and are scored on. `human` is read by people, and is for scoring alone.
$(MEDIA_SHARDS): .venv/speech
	test -d $(TALK) || $(MAKE) $(TALK)
	$(BIN)/python data_prep/moving_stamps.py --out $(MEDIA)/moving_stamps
	$(BIN)/python data_prep/spoken_stamps.py --out $(MEDIA)/spoken_stamps
	rm -rf $@ $@.partial
	set -e; for split in train val test kinds; do \
	  $(BIN)/python data_prep/make_shards.py video_qa $(MEDIA)/moving_stamps/$$split $@.partial/moves-$$split \
	    --split $$split --format activitynet_qa --set grouped=yes; \
	  $(BIN)/python data_prep/make_shards.py caption $(MEDIA)/moving_stamps/$$split $@.partial/told-$$split \
	    --split $$split --format captions; done
	set -e; for split in train val test; do \
	  for about in speech:transcribe:librispeech asked:vqa:spoken_question commands:instruct:chat; do \
	    name=$${about%%:*}; rest=$${about#*:}; \
	    $(BIN)/python data_prep/make_shards.py $${rest%:*} $(MEDIA)/spoken_stamps $@.partial/$$name-$$split \
	      --split $$split --format $${rest#*:} --media .cache/referential_scenes; done; done
	set -e; for split in train test; do \
	  $(BIN)/python data_prep/make_shards.py transcribe \
	    .cache/downloads/tuxpaint-stamps-default_2022.06.04-1_all/usr/share/tuxpaint/stamps \
	    $@.partial/human/$$split --split $$split --format stamp_speech --set language=en; done
	mv $@.partial $@

$(DIRECTED_SHARDS): .venv/speech
	$(BIN)/python data_prep/directed_speech.py --out $(DIRECTED) --check --page $(DIRECTED)/page.html
	rm -rf $@ $@.partial
	set -e; for split in train val test real; do \
	  $(BIN)/python data_prep/make_shards.py directed $(DIRECTED) $@.partial/$$split --split $$split; done
	mv $@.partial $@

directed-speech: .venv/speech  ## a corpus of speech to a device and to others: clips, a check, a page, shards
	test -d $(DIRECTED_SHARDS) || $(MAKE) $(DIRECTED_SHARDS)

media-scenes: .venv/speech  ## the clips and recordings of configs/demo_speech.yaml and demo_video.yaml, and the base models
	$(BIN)/python data_prep/base_models.py
	test -d $(MEDIA_SHARDS) || $(MAKE) $(MEDIA_SHARDS)

scenes: .venv/demo  ## the scenes of configs/demo_full.yaml, and the base models
	$(BIN)/python data_prep/base_models.py smollm2 efficientnet_lite0
	test -d $(TALK) || $(MAKE) $(TALK)

demo: .venv/demo  ## the main job on real input: data, two training stages, scores, a page to look at
	$(BIN)/python data_prep/base_models.py smollm2 efficientnet_lite0
	test -d $(SHARDS) || $(MAKE) $(SHARDS)
	$(BIN)/python train.py configs/demo.yaml
	$(BIN)/python benchmarks/demo.py

test: .venv/dev  ## all tests
	$(BIN)/python -m pytest

checks: .venv/dev  ## lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

docs: .venv/dev  ## this project's documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/dev  ## apply lint fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: .venv/dev  ## rewrite tests/golden after a change that is meant to alter numbers
	$(BIN)/python -m tests.golden.rewrite

tiny: .venv/demo  ## the random models and shards of configs/tiny.yaml
	$(BIN)/python tests/tiny.py

clean:  ## remove the demo's data and checkpoints, keep .venv and downloads
	rm -rf .cache/demo .cache/tiny checkpoints/first_words checkpoints/tiny
