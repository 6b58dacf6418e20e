"""What an HTTP service does: accept jobs, say how they are, cancel and delete them."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping

from disagg_ray.http.bodies import Upload, check_body, fingerprint, fingerprint_remix, repeated
from disagg_ray.http.clock import steady_now
from disagg_ray.http.files import Folder, file_of, name_of, thumbnail_of
from disagg_ray.http.keys import Key, Keys
from disagg_ray.http.limits import check_limits
from disagg_ray.http.metrics import Metrics
from disagg_ray.http.queues import Queues
from disagg_ray.http.runner import Runner
from disagg_ray.http.schema import ApiError, CreateVideo, StageProgress, Video, to_video
from disagg_ray.http.settings import Settings
from disagg_ray.http.store import UNFINISHED, Job, Store
from disagg_ray.http.upkeep import Upkeep
from disagg_ray.http.uploads import Uploads
from disagg_ray.service.stub import take_snapshot
from disagg_ray.text import shown


class Jobs:
    """All jobs of one process, from any thread."""

    def __init__(self, settings: Settings) -> None:
        """Open database and folder, connect to the services, and go on with what was left unfinished.

        Raises:
            DisaggError: a service, the database, the folder or the keys cannot be used.
        """
        configs = {model: take_snapshot(model).config for model in settings.models}
        self.settings, self.metrics = settings, Metrics()
        self.folder = Folder(settings.service.folder)
        self.store = Store(settings.database)
        self.uploads = Uploads(self.store, self.folder)
        self.keys = Keys(settings.service.api_keys, settings.session_key)
        self.workers = self.store.workers
        self.workers.become_one()
        own, expires_after_s = self.workers.own, settings.service.expires_after_s
        self.runners = {
            model: Runner(model, config, own, self.store, self.folder, expires_after_s, self.metrics.first_event)
            for model, config in configs.items()
        }
        self.queues = Queues(self.store, self.runners)
        self.upkeep = Upkeep(
            settings.service, self.store, self.folder, self.uploads, self.runners, self.queues, self.metrics
        )
        self.upkeep.start()

    def close(self) -> None:
        """Give running jobs `grace_s`, then leave the others to the next process."""
        self.upkeep.close()
        grace = [self.settings.grace_s]
        closing = [threading.Thread(target=runner.close, args=grace) for runner in self.runners.values()]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
        self.store.close()

    def accept(
        self, key: Key, body: CreateVideo, uploads: Mapping[str, Upload], idempotency_key: str | None = None
    ) -> Job:
        """Check a request and write its job; it is kept once this returns.

        Raises:
            ApiError: it cannot be served, the key is repeated with another body, or there is too much to do.
        """
        made_of = fingerprint(body, uploads)
        before = self._before(key, idempotency_key, made_of)
        return before or self._accept(key, body, uploads, idempotency_key, made_of)

    def _accept(
        self, key: Key, body: CreateVideo, uploads: Mapping[str, Upload], idempotency_key: str | None, made_of: str,
        remixed_from: str | None = None,
    ) -> Job:  # fmt: skip
        """Check a request that repeats none, write its job and have it run."""
        runner = self.runner(body.model)
        asked = check_body(body, uploads, runner.config, key.priority)
        now, job_id = time.time(), f"{runner.config.model.traits.makes}_{uuid.uuid4().hex}"
        images = {place: name_of(job_id, place) for place in uploads}
        job = Job(
            job_id, key.name, runner.model, self.workers.own, asked.prompt, asked.settings, images, asked.size,
            asked.seconds, now, remixed_from=remixed_from, idempotency_key=idempotency_key, fingerprint=made_of,
            length_s=asked.length_s, num_bytes=sum(len(upload.data) for upload in uploads.values()),
            deadline_at=steady_now() + body.deadline_s if body.deadline_s is not None else None,
        )  # fmt: skip
        with self.uploads.noted(job):
            for place, upload in uploads.items():
                self.folder.write(images[place], upload.data)
            before = self._add(job, key, runner)
        if before is not None:
            self.uploads.drop(job)
            return repeated(before, made_of)
        self.metrics.accepted(key.name)
        runner.run(job)
        return job

    def _before(self, key: Key, idempotency_key: str | None, made_of: str) -> Job | None:
        """Return the job that a POST made before, if this repeats one."""
        job = self.store.by_idempotency_key(key.name, idempotency_key) if idempotency_key is not None else None
        return repeated(job, made_of) if job is not None else None

    def _add(self, job: Job, key: Key, runner: Runner) -> Job | None:
        """Write the row of a job; if its Idempotency-Key made one before, return that instead."""
        seconds_each = self.queues.seconds_each(runner.model)
        with self.store.accepting(key.name) as accepting:
            if job.idempotency_key is not None and (before := accepting.find(job.idempotency_key)):
                return before
            check_limits(accepting, key, job, runner.config.limits.max_queued, seconds_each)
            self.uploads.take(accepting, job)
            accepting.add(job)
        return None

    def runner(self, model: str | None) -> Runner:
        """Return what runs a model's jobs; None is the only one.

        Raises:
            ApiError: there is no such model, or none is named and there are several.
        """
        known = ", ".join(self.runners)
        if model is None and len(self.runners) > 1:
            raise ApiError(400, f"model: missing; give one of {known}", param="model")
        name = next(iter(self.runners)) if model is None else model
        if name not in self.runners:
            message = f"model: {shown(name)} is unknown; give one of {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.runners[name]

    def find(self, key: Key, job_id: str) -> Job:
        """Return a job of a key.

        Raises:
            ApiError: no job of this key has that id.
        """
        job = self.store.get(job_id, key.name)
        if job is None:
            raise ApiError(404, f"video_id: there is no job {shown(job_id)}", param="video_id", code="not_found")
        return job

    def show(self, job: Job) -> Video:
        """Return the answer that describes a job, as far as this process knows."""
        runner = self.runners.get(job.model)
        if job.is_finished or runner is None:
            return to_video(job)
        job = runner.view(job)
        shares = runner.pace.shares(job)
        stages = [
            StageProgress(stage=name, state=job.stages[name][0], step=job.stages[name][1], steps=job.stages[name][2],
                          share=share)
            for name, share in shares.items() if name in job.stages
        ]  # fmt: skip
        place = self.queues.place(job)
        ahead = place.ahead if job.status == "queued" else None
        wait_s = round(place.wait_s, 1) if place.wait_s is not None else None
        return to_video(job, stages=stages, queue_position=ahead, wait_s=wait_s)

    def cancel(self, key: Key, job_id: str) -> Job:
        """Cancel a job; what runs of it ends within a step.

        Raises:
            ApiError: there is no such job, or it has ended otherwise.
        """
        job = self.find(key, job_id)
        if not self.store.change(job_id, UNFINISHED, status="cancelling"):
            job = self.find(key, job_id)
            if job.status != "cancelled":
                raise ApiError(409, f"video_id: the {job.makes} is {job.status}, no longer to cancel", param="video_id")
            return job
        self._cancel_here(job)
        return self.find(key, job_id)

    def _cancel_here(self, job: Job) -> None:
        if (runner := self.runners.get(job.model)) is not None:
            runner.cancel(job.id)

    def delete(self, key: Key, job_id: str) -> Job:
        """Delete a job and its files; one that runs is cancelled. Return it."""
        job = self.find(key, job_id)
        self.folder.remove_all_of(job)  # first: what fails may be asked again; a full disk gets room for the row
        self.store.delete(job_id)
        self._cancel_here(job)
        self.folder.remove_all_of(job)  # what was made meanwhile
        return job

    def remix(self, key: Key, job_id: str, prompt: str, idempotency_key: str | None) -> Job:
        """Accept a new prompt with the settings and files of another job.

        Raises:
            ApiError: as `accept` and `find`, or the files have expired.
        """
        made_of = fingerprint_remix(job_id, prompt)
        if (before := self._before(key, idempotency_key, made_of)) is not None:
            return before
        source = self.find(key, job_id)
        if source.images and source.num_bytes == 0:
            raise ApiError(404, "video_id: the files it was made of have expired", param="video_id", code="expired")
        fields = {name: value for name, value in source.settings.items() if name not in ("height", "width", "priority")}
        body = CreateVideo(prompt=prompt, model=source.model, size=source.size, **fields)
        uploads = {
            place: Upload(place, b"".join(self.folder.read(file, 0, self.folder.size(file))))
            for place, file in source.images.items()
        }
        return self._accept(key, body, uploads, idempotency_key, made_of, remixed_from=job_id)

    def content(self, job: Job, variant: str) -> tuple[str, int]:
        """Return the name and bytes of a file of a finished job.

        Raises:
            ApiError: the job is not completed, or its file has expired.
        """
        if job.status != "completed":
            message = f"video_id: the {job.makes} is {job.status}, and has no content"
            raise ApiError(404 if job.is_finished else 409, message, param="video_id", code="not_ready")
        if job.num_bytes == 0:
            raise ApiError(404, f"video_id: the {job.makes} has expired", param="video_id", code="expired")
        name = file_of(job)
        if variant == "thumbnail":
            name = thumbnail_of(job)
            self.folder.add_thumbnail(job)
            if (row := self.store.get(job.id)) is None or row.num_bytes == 0:  # deleted or expired meanwhile
                self.folder.remove(name)
        return name, self.folder.size(name)

    def subscribe(self, job: Job, receive: Callable[[Job], None]) -> Callable[[], None]:
        runner = self.runners.get(job.model)
        return runner.subscribe(job.id, receive) if runner is not None else lambda: None
