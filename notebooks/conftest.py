"""pytest reads this before it starts a kernel: notebooks are tested as tools/suite.py says."""

# --doctest-modules would import the scripts, that is, run every notebook a second time
collect_ignore_glob = ["scripts/*"]


def pytest_configure(config):
    config.pluginmanager.import_plugin("suite")
