# SPDX-License-Identifier: Apache-2.0
"""Concurrent requests to a running server, with OpenAI's client: python openai_client.py http://127.0.0.1:30000"""

import asyncio
import sys

from openai import AsyncOpenAI

QUESTION = "Recite Sonnet 18."
REQUESTS = 8


async def ask(client: AsyncOpenAI, model: str) -> str:
    """One answer, streamed."""
    messages = [{"role": "user", "content": QUESTION}]
    stream = await client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=400, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def main(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = (await client.models.list()).data[0].id
        answers = await asyncio.gather(*(ask(client, model) for _ in range(REQUESTS)))
    print(answers[0])
    print(f"{REQUESTS} requests at once, {len(set(answers))} different answer(s)")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
