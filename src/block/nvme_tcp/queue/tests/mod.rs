//! Queues against a controller played by a thread ([`peer`]), with the paths' threads played by [`rig`].

mod copies;
mod encrypted;
mod ends;
mod faults;
mod paths;
mod peer;
mod reservations;
mod rig;
mod tls;
mod transfers;

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

/// Waits for all of them, whichever ends first.
async fn all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<F::Output>> = running.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        let mut all = true;
        for (future, done) in running.iter_mut().zip(&mut done) {
            if done.is_none() {
                match future.as_mut().poll(cx) {
                    Poll::Ready(output) => *done = Some(output),
                    Poll::Pending => all = false,
                }
            }
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}
