"""pytest reads this first: the tests run in the suite's environment (tools/suite.py)."""

import signal


def pytest_configure(config):
    config.pluginmanager.import_plugin("suite")
    # a shell that starts pytest in the background lets it ignore Ctrl-C, which some tests send
    signal.signal(signal.SIGINT, signal.default_int_handler)
