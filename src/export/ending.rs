//! Work that the end of the mount cuts short.

use std::time::Duration;

use tokio::sync::watch;

/// How long the end of the mount waits for what is done at once if the store answers.
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// Works until that is done, or until the mount has been ending for so long, and then returns `None`.
pub(super) async fn until_end<T>(
    stopping: &mut watch::Receiver<bool>,
    grace: Duration,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::select! {
        biased;
        done = work => Some(done),
        () = async {
            // Who would tell it is gone with the mount.
            let _ = stopping.wait_for(|stopping| *stopping).await;
            tokio::time::sleep(grace).await;
        } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_the_mount_is_the_end_of_what_does_not_come() {
        let (stop, mut stopping) = watch::channel(false);
        let pause = tokio::time::sleep(Duration::from_millis(1));
        assert_eq!(until_end(&mut stopping, Duration::ZERO, pause).await, Some(()));
        stop.send_replace(true);
        let never = std::future::pending::<()>();
        assert_eq!(until_end(&mut stopping, Duration::ZERO, never).await, None);
        // What takes a moment is waited for.
        let pause = tokio::time::sleep(Duration::from_millis(1));
        assert_eq!(until_end(&mut stopping, Duration::from_secs(3600), pause).await, Some(()));
    }
}
