//! Asynchronous events.

/// The result of an Asynchronous Event Request (Base 5.2, figure 146).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncEvent {
    /// What happened.
    pub kind: AsyncEventKind,
    /// The log page to read; it is what makes the controller tell the next event of this type.
    pub log_page: u8,
}

/// What an asynchronous event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsyncEventKind {
    /// Namespaces have changed, come or gone.
    NamespaceChanged,
    /// The ANA log has changed.
    AnaChanged,
    /// The Discovery log has changed.
    DiscoveryChanged,
    /// Something of a reservation, or another event of the NVM command set, with its information.
    CommandSet(u8),
    /// The controller failed for good (Base 5.2: Persistent Internal Error): it has to be reset.
    PersistentInternalError,
    /// Another event: type and information.
    Other {
        /// Its type.
        event: u8,
        /// Its information.
        information: u8,
    },
}

impl AsyncEvent {
    /// From a command's result, [`super::super::Cqe::result`].
    pub fn from_result(result: u64) -> Self {
        let event = (result & 7) as u8;
        let information = (result >> 8) as u8;
        let kind = match (event, information) {
            (0, 0x03) => AsyncEventKind::PersistentInternalError,
            (2, 0x00) => AsyncEventKind::NamespaceChanged,
            (2, 0x03) => AsyncEventKind::AnaChanged,
            (2, 0xf0) => AsyncEventKind::DiscoveryChanged,
            (6, _) => AsyncEventKind::CommandSet(information),
            _ => AsyncEventKind::Other { event, information },
        };
        Self {
            kind,
            log_page: (result >> 16) as u8,
        }
    }
}
