"""Mean reward and tool calls of a live run, minute by minute from its start: `python analytics.py runs/NAME`.

Needs nats-py[nkeys] and msgpack, and none of our packages: the log is the interface. Its messages are msgpack with a
`kind`, on `log.<run>.t.<trajectory>.<kind>`; they are got one after another, without a consumer, so the run does not
notice.
"""

import asyncio
import json
import sys
from pathlib import Path

import msgpack
import nats


async def main(folder: Path) -> None:
    """Follow the log until the run's end."""
    logins = json.loads((folder / "endpoint.json").read_bytes())["logins"]["by_role"]
    login = logins["analytics"]  # may read the log, and nothing else
    client = await nats.connect(
        login["url"], nkeys_seed_str=login["seed"], inbox_prefix="_INBOX.analytics"
    )
    kind, seq, minute, rewards, calls = "", 0, "", [], 0
    while kind != "ended":
        query = json.dumps({"seq": seq + 1, "next_by_subj": f"log.{folder.name}.>"}).encode()
        message = await client.request("$JS.API.DIRECT.GET.LOG", query)
        if "Nats-Sequence" not in message.headers:  # status 404: that was all until now
            await asyncio.sleep(0.5)
            continue
        seq, time = int(message.headers["Nats-Sequence"]), message.headers["Nats-Time-Stamp"]
        event = msgpack.unpackb(message.data)
        kind = event["kind"]
        if minute and (time[:16] != minute or kind == "ended"):
            mean = f"{sum(rewards) / len(rewards):.3f}" if rewards else "-"
            print(f"{minute}  reward {mean} of {len(rewards)}  {calls} tool calls", flush=True)
            rewards, calls = [], 0
        minute = time[:16]
        calls += kind == "result"
        rewards += [event["reward"]] if kind == "scored" else []
    await client.close()


asyncio.run(main(Path(sys.argv[1])))
