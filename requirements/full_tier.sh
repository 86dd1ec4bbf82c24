# Prints that the full tier has just passed, for tests/full_tier.md.
versions() { ".venv/$1/bin/python" requirements/show.py "$1" 2>/dev/null; }

echo "# When all tests last passed"
echo
echo "\`make test-all\` has passed on $(date -u +%Y-%m-%d) at commit $(git rev-parse --short HEAD):"
echo
for name in oldest newest tpu; do echo "- $(versions $name)"; done
