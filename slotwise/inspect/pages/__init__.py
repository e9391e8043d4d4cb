"""The bodies, styles and scripts of the pages that `slotwise.inspect.page` puts together; no Python."""
