//! A child process whose output is followed to its end, but neither for ever nor without limit.

use crate::console::Ending;
use anyhow::Result;
use std::io::Read;
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Reads in a thread of its own, until the other side closes or nobody listens.
pub(crate) fn read_in_background(mut reader: std::io::PipeReader) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = reader.read(&mut buffer) {
            if sender.send(buffer[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// How the following ended.
pub(crate) enum Followed {
    /// The other side closed.
    ToTheEnd,
    /// The deadline passed.
    TooLong,
    /// `take` had enough.
    TooMuch,
}

/// What one who follows wants next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wish {
    /// More.
    GoOn,
    /// More, but not for longer than so: it has seen what it looked for.
    ForAnother(Duration),
    /// No more.
    Enough,
}

/// Hands every chunk to `take` until the other side closes, the deadline passes or `take` has had enough.
pub(crate) fn follow(
    chunks: &Receiver<Vec<u8>>,
    mut deadline: Instant,
    mut take: impl FnMut(&[u8]) -> Result<Wish>,
) -> Result<Followed> {
    loop {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else {
            return Ok(Followed::TooLong);
        };
        match chunks.recv_timeout(left) {
            Ok(chunk) => match take(&chunk)? {
                Wish::GoOn => {}
                Wish::ForAnother(time) => deadline = deadline.min(Instant::now() + time),
                Wish::Enough => return Ok(Followed::TooMuch),
            },
            Err(RecvTimeoutError::Timeout) => return Ok(Followed::TooLong),
            Err(RecvTimeoutError::Disconnected) => return Ok(Followed::ToTheEnd),
        }
    }
}

/// Waits for a child that has closed its output; it has 10 seconds to end.
pub(crate) fn end_of(child: &mut Child, timeout: u64) -> Result<Ending> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code().map_or(Ending::Signal, Ending::Status));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    killed(child, Ending::Timeout(timeout))
}

/// Ends a child, if it has not ended by itself.
pub(crate) fn killed(child: &mut Child, ending: Ending) -> Result<Ending> {
    // It may have ended meanwhile: `wait` tells.
    let _ = child.kill();
    child.wait()?;
    Ok(ending)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_that_does_not_end_is_given_up_at_the_deadline() {
        let (sender, receiver) = channel();
        sender.send(b"a".to_vec()).unwrap();
        let soon = Instant::now() + Duration::from_millis(20);
        let mut seen = Vec::new();
        let followed = follow(&receiver, soon, |chunk| {
            seen.extend_from_slice(chunk);
            Ok(Wish::GoOn)
        });
        assert!(matches!(followed, Ok(Followed::TooLong)));
        assert_eq!(seen, b"a");
        sender.send(b"b".to_vec()).unwrap();
        drop(sender);
        let later = Instant::now() + Duration::from_secs(60);
        assert!(matches!(follow(&receiver, later, |_| Ok(Wish::GoOn)), Ok(Followed::ToTheEnd)));
    }

    #[test]
    fn who_has_seen_enough_to_know_waits_no_longer_than_he_says() {
        let (sender, receiver) = channel();
        sender.send(b"a".to_vec()).unwrap();
        let later = Instant::now() + Duration::from_secs(600);
        let soon = Wish::ForAnother(Duration::from_millis(20));
        assert!(matches!(follow(&receiver, later, |_| Ok(soon)), Ok(Followed::TooLong)));
    }

    #[test]
    fn a_console_without_end_is_given_up_too() {
        let (sender, receiver) = channel();
        sender.send(b"a".to_vec()).unwrap();
        let later = Instant::now() + Duration::from_secs(60);
        assert!(matches!(follow(&receiver, later, |_| Ok(Wish::Enough)), Ok(Followed::TooMuch)));
    }
}
