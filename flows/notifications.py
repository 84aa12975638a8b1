"""Notifications: a webhook of Prefect's, and the automations that call it.

One for a batch that says it is failing (`flows.batch_event`), one for a deployment's run that crashed or failed as a
whole, which may have said nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.batch_event import EVENT, OUTCOME_LABEL, RESOURCE
from flows.deployment_file import Notification
from flows.registered import Action, Registered, registered
from onnx_config.errors import InputError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import BlockDocument
    from prefect.events.schemas.automations import AutomationCore

__all__ = ["check_urls", "register_notification"]

_FLOW = "convert_models"
_BLOCK_TYPE = "webhook"
_HEADERS = {"Content-Type": "application/json"}
# Prefect's templates are Jinja's; tojson quotes what comes from models and errors.
_FAILING = (
    '{"text": {{ ("onnx-ferry: batch " ~ event.payload.batch ~ ": " ~ (event.payload.failed + event.payload.mismatch)'
    ' ~ " of " ~ event.payload.models ~ " models failed (" ~ (event.payload.failure_rate * 100) | round(1) ~ " %)")'
    ' | tojson }}, "event": {{ event.event | tojson }}, "payload": {{ event.payload | tojson }}}'
)
_ENDED_BADLY = (
    '{"text": {{ ("onnx-ferry: run " ~ flow_run.name ~ " of " ~ flow.name ~ ": " ~ flow_run.state.name ~ ": "'
    ' ~ (flow_run.state.message or "")) | tojson }}, "event": {{ event.event | tojson }},'
    ' "flow_run": {{ (flow_run.id ~ "") | tojson }}}'
)


def check_urls(notifications: Sequence[Notification]) -> dict[str, str]:
    """Return each notification's URL by its name.

    Raises:
        InputError: If the environment lacks one, or it is no URL.
    """
    urls = {one.name: os.environ.get(one.url_variable, "").strip() for one in notifications}
    for one in notifications:
        if not urls[one.name].startswith(("http://", "https://")):
            found = "is not set" if not urls[one.name] else "is no http:// or https:// URL"
            raise InputError(
                f"The notification {one.name!r} goes to the URL in the environment variable {one.url_variable}, which "
                f"{found}. Set it where ferry deploy runs, or remove the notification."
            )
    return urls


def register_notification(notification: Notification, url: str, client: SyncPrefectClient, dry_run: bool) -> Registered:
    """Make the server have a notification's webhook and automations; those that are there and the same stay."""
    name = notification.name
    block = _block(name, client)
    changed = []
    if block is not None and block.data != _block_data(url):
        changed.append("url")
    automations = {} if block is None else _automations(name, block.id)
    there = {title: _there(title, client) for title in automations}
    changed += [title for title, wanted in automations.items() if not _same(there[title], wanted)]

    def do(_action: Action) -> None:
        number = _save_block(name, url, block, client)
        for title, wanted in _automations(name, number).items():
            found = _there(title, client)
            if found is None:
                client.create_automation(wanted)
            elif not _same(found, wanted):
                client.update_automation(found.id, wanted)

    return registered("notification", name, block, changed, do, dry_run=dry_run)


def _block_name(name: str) -> str:
    """Return a name that Prefect takes for a block: small letters, digits and dashes.

    >>> _block_name("Team A")
    'ferry-team-a'
    """
    return "ferry-" + "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())


def _block(name: str, client: SyncPrefectClient) -> BlockDocument | None:
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_block_document_by_name(_block_name(name), _BLOCK_TYPE, include_secrets=True)
    except ObjectNotFound:
        return None


def _block_data(url: str) -> dict[str, Any]:
    return {"method": "POST", "url": url, "headers": _HEADERS, "allow_private_urls": True, "verify": True}


def _save_block(name: str, url: str, there: BlockDocument | None, client: SyncPrefectClient) -> UUID:
    from prefect.blocks.webhook import Webhook
    from prefect.client.schemas.actions import BlockDocumentCreate, BlockDocumentUpdate

    kind = client.read_block_type_by_slug(_BLOCK_TYPE)
    schema = client.read_block_schema_by_checksum(Webhook._calculate_schema_checksum())
    if there is not None:
        update = BlockDocumentUpdate(block_schema_id=schema.id, data=_block_data(url), merge_existing_data=False)
        client.update_block_document(there.id, update)
        return there.id
    made = client.create_block_document(
        BlockDocumentCreate(
            name=_block_name(name), data=_block_data(url), block_type_id=kind.id, block_schema_id=schema.id
        ),
        include_secrets=False,
    )
    return made.id


def _automations(name: str, block: UUID) -> dict[str, AutomationCore]:
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    failing = EventTrigger(
        expect={EVENT},
        match=ResourceSpecification({"prefect.resource.id": f"{RESOURCE}.*", OUTCOME_LABEL: "failing"}),
        posture=Posture.Reactive,
        threshold=1,
    )
    badly = EventTrigger(
        expect={"prefect.flow-run.Crashed", "prefect.flow-run.Failed"},
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        # What is started by hand says on the terminal how it ended.
        match_related=[
            ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": _FLOW}),
            ResourceSpecification({"prefect.resource.role": "deployment"}),
        ],
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )
    wanted = {
        f"{name}: batch failing": (failing, _FAILING, "A batch had more failures than FERRY_FAILURE_THRESHOLD allows."),
        f"{name}: run crashed": (badly, _ENDED_BADLY, f"A deployment's run of {_FLOW} crashed, or failed as a whole."),
    }
    return {
        title: AutomationCore(
            name=title,
            description=f"{description} Registered by ferry deploy.",
            trigger=trigger,
            actions=[CallWebhook(block_document_id=block, payload=payload)],
        )
        for title, (trigger, payload, description) in wanted.items()
    }


def _there(title: str, client: SyncPrefectClient) -> Any:
    return next(iter(client.read_automations_by_name(title)), None)


def _same(there: Any, wanted: AutomationCore) -> bool:
    if there is None:
        return False
    kept = {"name", "description", "trigger", "actions"}
    return bool(_comparable(there.model_dump(include=kept)) == _comparable(wanted.model_dump(include=kept)))


def _comparable(value: Any) -> Any:
    """Return a value without the numbers that a server gives to parts, and without order where there is none."""
    if isinstance(value, dict):
        return {key: _comparable(one) for key, one in value.items() if key != "id"}
    if isinstance(value, list):
        return [_comparable(one) for one in value]
    return sorted(value) if isinstance(value, set) else str(value)
