# The two commands of the README; without make, run the scripts themselves.

.PHONY: demo test

demo:
	@scripts/demo.sh

test:
	@scripts/test.sh
