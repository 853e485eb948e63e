"""What a user sees of the data before the first step: two rows in colour and the supervision audit."""

import json
import sys
from pathlib import Path

from finetune.data.audit import SupervisionAudit, audit_table
from finetune.data.inspect import Preview

# Characters of a preview on the terminal; the page in the run folder shows all of it.
_SHOWN = 4000
AUDIT_FILE, PREVIEW_FILE = "data_audit.json", "data_preview.html"


def show(preview: Preview | None, audits: dict[str, SupervisionAudit]) -> None:
    """Prints two rows and the audit table to standard error."""
    if preview is not None:
        text = preview.to_terminal(color=sys.stderr.isatty())
        cut = f" ...\n(the whole rows are in {PREVIEW_FILE})" if len(text) > _SHOWN else ""
        print(text[:_SHOWN] + ("\033[0m" if cut and sys.stderr.isatty() else "") + cut, file=sys.stderr)
    if audits:
        print(audit_table(audits), file=sys.stderr, flush=True)


def write(folder: str, preview: Preview | None, audits: dict[str, SupervisionAudit]) -> None:
    """Writes the audit and the preview into the run folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if audits:
        content = {name: audit.to_dict() for name, audit in audits.items()}
        (target / AUDIT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if preview is not None:
        (target / PREVIEW_FILE).write_text(preview.to_html(), encoding="utf-8")
