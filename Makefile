# The commands of the README; without make, run the scripts themselves.

.PHONY: demo quick test

demo:
	@scripts/demo.sh

quick:
	@scripts/test.sh --quick

test:
	@scripts/test.sh
