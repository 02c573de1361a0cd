//! Uploads that were started and whose ids were never heard: they are looked for and given up.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tracing::{info, warn};

use super::context::Context;
use super::ending::{GRACE, until_end};
use super::lease;
use super::multipart::digests::joined;
use super::multipart::intents::RecordedIntent;
use crate::bucket::{Bucket, ObjectKey};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{self, Step};

/// Settles intents as they come, until the mount ends.
pub(super) async fn settle_all(context: Weak<Context>, mut doubtful: UnboundedReceiver<RecordedIntent>) {
    while let Some(intent) = doubtful.recv().await {
        let Some(context) = context.upgrade() else { return };
        // Not counted: what the end of the mount cuts off the next one does.
        tokio::spawn(async move {
            until_end(&mut context.stopping.subscribe(), Duration::ZERO, settle(&context, &intent, 0)).await;
        });
    }
}

/// Settles an intent of an earlier process: what can be done at once is done before the mount ends, if the store answers.
pub(super) async fn settle_found(context: &Arc<Context>, intent: RecordedIntent) {
    let mut stopping = context.stopping.subscribe();
    let first = until_end(&mut stopping, GRACE, attempt(context, &intent, 0)).await;
    let Some(pause) = first.flatten() else { return };
    let later = async {
        tokio::time::sleep(pause).await;
        settle(context, &intent, 1).await;
    };
    until_end(&mut stopping, Duration::ZERO, later).await;
}

/// Looks for an upload until that is done.
async fn settle(context: &Arc<Context>, intent: &RecordedIntent, failures: u32) {
    for failures in failures.. {
        match attempt(context, intent, failures).await {
            Some(pause) => tokio::time::sleep(pause).await,
            None => return,
        }
    }
}

/// Looks for an upload; returns after which time that is to be done again, or `None` when it is over, for this mount.
async fn attempt(context: &Arc<Context>, intent: &RecordedIntent, failures: u32) -> Option<Duration> {
    match look(context, intent).await {
        Ok(early) => early,
        // The next mount may have the bucket, or credentials that may list its uploads.
        Err(error) if !error.is_transient() => {
            warn!("an upload that may be left over is not looked for: {}", error.report());
            None
        }
        Err(error) => {
            warn!("an upload that may be left over is looked for again later: {}", error.report());
            Some(context.settings.retries.pause(failures))
        }
    }
}

/// Gives the uploads up that were started for an intent and that nobody knows. Returns how long it is too early for that.
async fn look(context: &Arc<Context>, recorded: &RecordedIntent) -> Result<Option<Duration>> {
    let intent = &recorded.intent;
    let (bucket, key) = (&context.mounted(&intent.bucket)?.bucket, &intent.key);
    // No upload of the key is started meanwhile whose log is not there yet.
    let gate = context.uploads.gate(bucket.name(), key);
    let _guard = gate.lock().await;
    let pending = bucket.pending_uploads(key).await?;
    let pending = pending.ok_or_else(|| Error::unsupported("the store lists no uploads"))?;
    if let Some(early) = intent.early_by(pending.at) {
        return Ok(Some(early));
    }
    let ids = pending.uploads.into_iter().filter(|upload| intent.may_be(upload)).map(|upload| upload.id);
    let candidates = unknown(context, bucket, key, ids.collect()).await?;
    match recorded.lost(candidates) {
        Err(early) => return Ok(Some(early)),
        Ok(lost) => {
            for upload in lost {
                failpoint::pass(Step::UploadAbort)?;
                bucket.abort_upload(key, &upload).await?;
                info!(%key, "an upload that had begun unheard was given up");
            }
        }
    }
    recorded.remove();
    Ok(None)
}

/// Those of a key's uploads that no log and no heartbeat names, and that have no part.
async fn unknown(
    context: &Arc<Context>,
    bucket: &Bucket,
    key: &ObjectKey,
    uploads: Vec<String>,
) -> Result<Vec<String>> {
    if uploads.is_empty() {
        return Ok(uploads);
    }
    let logs = context.uploads.clone();
    let named: HashSet<String> = joined(tokio::task::spawn_blocking(move || logs.named()).await)??;
    let leased = lease::uploads_of(bucket, key).await?;
    let mut unknown = Vec::new();
    for id in uploads {
        let is_named = named.contains(&id) || leased.iter().any(|log| log.contains(&id));
        if !is_named && !has_part(bucket, key, &id).await? {
            unknown.push(id);
        }
    }
    Ok(unknown)
}

/// Whether an upload has a part, or is gone.
async fn has_part(bucket: &Bucket, key: &ObjectKey, upload: &str) -> Result<bool> {
    match bucket.has_part(key, upload).await {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        answer => answer,
    }
}
