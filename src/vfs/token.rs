//! Asking for the same export twice: client tokens, and what was done already.

use std::sync::Arc;

use super::{ObjectName, Vfs};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Job, JobSource, JobState, StatusImage};

/// The extended attribute by which a client names its request, before it copies.
pub(super) const TOKEN_XATTR: &str = "user.freightfs.client_token";

/// Most characters of a token (Alibaba Cloud ECS, ExportImage: "a maximum of 64 ASCII characters").
const MAX_TOKEN: usize = 64;

impl Vfs {
    /// Names the next export to a key, or takes the name back.
    ///
    /// # Errors
    /// [`TokenTooLong`](ErrorKind::TokenTooLong) above 64 characters, [`Malformed`](ErrorKind::Malformed) when they are
    /// not ASCII.
    pub(super) fn set_client_token(&self, object: &ObjectName, token: Option<&[u8]>) -> Result<bool> {
        let mut tokens = self.tokens.lock();
        let Some(token) = token else { return Ok(tokens.remove(object).is_some()) };
        if token.len() > MAX_TOKEN {
            let what = format!("a client token has at most {MAX_TOKEN} characters, not {}", token.len());
            return Err(Error::new(ErrorKind::TokenTooLong, what).in_file(object.1.as_str()));
        }
        let plain = |text: &&str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        let text = std::str::from_utf8(token).ok().filter(plain).ok_or_else(|| {
            Error::new(ErrorKind::Malformed, "a client token has printable ASCII characters only")
                .in_file(object.1.as_str())
        })?;
        tokens.insert(object.clone(), text.to_owned());
        Ok(true)
    }

    /// The name of the next export to a key; that of the last one where none was given since.
    pub(super) fn client_token(&self, object: &ObjectName) -> Option<String> {
        self.tokens.lock().get(object).cloned()
    }

    /// Whether a running job of this key was asked for by the token that the key has now: asking again is no conflict.
    pub(super) fn is_asked_again(&self, object: &ObjectName, job: &Job) -> bool {
        let token = self.client_token(object);
        token.is_some() && job.request().client_token == token
    }

    /// The job that did or does what is asked for, so that nothing is uploaded twice.
    ///
    /// # Errors
    /// [`AlreadyExists`](ErrorKind::AlreadyExists) when the token named another request.
    pub(super) async fn same_export(
        &self,
        object: &ObjectName,
        image: &StatusImage,
    ) -> Result<Option<Arc<Job>>> {
        let is_same = |job: &Job| {
            let request = job.request();
            (&request.bucket, &request.key) == (&object.0, &object.1)
                && request.tags == self.tags(object)
                && matches!(&request.source, JobSource::Image(known) if known.is_same(image))
        };
        let job = match self.client_token(object) {
            Some(token) => {
                let named = |job: &Arc<Job>| job.request().client_token.as_ref() == Some(&token);
                let known = self.jobs.jobs().into_iter().rev().find(named);
                if known.as_ref().is_some_and(|job| !is_same(job)) {
                    let what = format!("the client token {token:?} named another request");
                    return Err(Error::new(ErrorKind::AlreadyExists, what).in_file(object.1.as_str()));
                }
                known
            }
            None => self.jobs.newest(&object.0, &object.1).filter(|job| is_same(job)),
        };
        let Some(job) = job else { return Ok(None) };
        let status = job.status();
        match status.status {
            JobState::Init | JobState::Running => Ok(Some(job)),
            JobState::Success => {
                // The object must still be the one that the job made.
                let there = self.bucket(&object.0)?.head(&object.1).await?;
                let unchanged = there.is_some_and(|meta| {
                    status.etag.is_some() && meta.etag == status.etag && Some(meta.object_size) == status.size
                });
                Ok(unchanged.then_some(job))
            }
            JobState::Fail | JobState::Cancelled => Ok(None),
        }
    }
}
