use super::*;

fn uri(text: &str) -> Uri {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn at(host: &str, port: u16) -> Address {
    Address {
        host: host.to_owned(),
        port,
    }
}

#[test]
fn a_name_says_where_and_which() {
    let uri =
        uri("nvme+tcp://Storage-1.lan,10.0.0.2:4421,[FE80::0:1]:9/nqn.2019-08.org.q:a?nsid=3");
    assert_eq!(
        uri.addresses,
        [
            at("storage-1.lan", 4420),
            at("10.0.0.2", 4421),
            at("fe80::1", 9)
        ]
    );
    assert_eq!(uri.subsystem, "nqn.2019-08.org.q:a");
    assert_eq!(uri.namespace, NamespaceName::Nsid(3));
}

#[test]
fn a_name_is_displayed_as_one_that_means_the_same() {
    for (written, shown) in [
        (
            "nvme+tcp://h/nqn.a:b?nsid=1",
            "nvme+tcp://h:4420/nqn.a:b?nsid=1",
        ),
        (
            "nvme+tcp://[::1]/n?nsid=4294967294",
            "nvme+tcp://[::1]:4420/n?nsid=4294967294",
        ),
        (
            "nvme+tcp://a:1,b:2/%6e%2Fx%3F%23%25%C3%A9?nguid=00112233445566778899AABBCCDDEEFF",
            "nvme+tcp://a:1,b:2/n%2Fx%3F%23%25%C3%A9?nguid=00112233445566778899aabbccddeeff",
        ),
        (
            "nvme+tcp://a:1/n?uuid=00112233-4455-6677-8899-aabbccddeeff",
            "nvme+tcp://a:1/n?uuid=00112233-4455-6677-8899-aabbccddeeff",
        ),
        (
            "nvme+tcp://a:1/n?eui64=0011223344556677",
            "nvme+tcp://a:1/n?eui64=0011223344556677",
        ),
    ] {
        let first = uri(written);
        assert_eq!(first.to_string(), shown);
        assert_eq!(uri(shown), first);
    }
    for (written, shown) in [
        ("nvme+tcp://h", "nvme+tcp://h:4420"),
        ("nvme+tcp://h/", ""),
        ("nvme+tcp://h:1,g/n%20x", ""),
        ("nvme+tcp://h:1,g/n%25x", "nvme+tcp://h:1,g:4420/n%25x"),
    ] {
        match written.parse::<Allowed>() {
            Ok(allowed) => {
                assert_eq!(allowed.to_string(), shown);
                assert_eq!(shown.parse::<Allowed>().unwrap(), allowed);
            }
            Err(_) => assert_eq!(shown, "", "{written}"),
        }
    }
}

#[test]
fn what_is_no_name_is_refused_with_what_to_write() {
    let many = (0..=MAX_ADDRESSES)
        .map(|n| format!("h{n}"))
        .collect::<Vec<_>>()
        .join(",");
    let many = format!("nvme+tcp://{many}/n?nsid=1");
    let long = format!("nvme+tcp://h/{}?nsid=1", "n".repeat(MAX_NQN + 1));
    let longest = format!("nvme+tcp://h/{}?nsid=1", "n".repeat(9000));
    let host = format!("nvme+tcp://{}/n?nsid=1", "h".repeat(254));
    for (text, why) in [
        ("nvme+rdma://h/n?nsid=1", "no name of a remote namespace"),
        ("nvme+tcp://h/n", "?nsid=N"),
        ("nvme+tcp://h?nsid=1", "names no subsystem"),
        ("nvme+tcp://h/?nsid=1", "names no subsystem"),
        ("nvme+tcp:///n?nsid=1", "without a host"),
        ("nvme+tcp://h,/n?nsid=1", "without a host"),
        ("nvme+tcp://h,h:4420/n?nsid=1", "the address h:4420 twice"),
        ("nvme+tcp://[::1],[0:0::1]/n?nsid=1", "twice"),
        ("nvme+tcp://h:0/n?nsid=1", "write 1 to 65535"),
        ("nvme+tcp://h:+1/n?nsid=1", "write 1 to 65535"),
        ("nvme+tcp://h:/n?nsid=1", "write 1 to 65535"),
        ("nvme+tcp://h:65536/n?nsid=1", "write 1 to 65535"),
        ("nvme+tcp://::1/n?nsid=1", "without brackets"),
        ("nvme+tcp://[::1/n?nsid=1", "unpaired bracket"),
        ("nvme+tcp://[::1]4420/n?nsid=1", "unpaired bracket"),
        ("nvme+tcp://[h]/n?nsid=1", "no IPv6 address"),
        ("nvme+tcp://10.0.0.300/n?nsid=1", "a host that is none"),
        ("nvme+tcp://h ost/n?nsid=1", "a host that is none"),
        ("nvme+tcp://-h/n?nsid=1", "a host that is none"),
        ("nvme+tcp://user:pw@h/n?nsid=1", "nvme-dhchap-secret"),
        ("nvme+tcp://h/n/?nsid=1", "%2F"),
        ("nvme+tcp://h/n%2?nsid=1", "two hexadecimal digits"),
        ("nvme+tcp://h/n%+1?nsid=1", "two hexadecimal digits"),
        ("nvme+tcp://h/%ff?nsid=1", "no UTF-8"),
        ("nvme+tcp://h/n%00?nsid=1", "control character"),
        ("nvme+tcp://h/n x?nsid=1", "a blank"),
        ("nvme+tcp://h/n?nsid=1#x", "%23"),
        ("nvme+tcp://h/n?", "nsid="),
        ("nvme+tcp://h/n?nsid", "nsid that is none"),
        ("nvme+tcp://h/n?nsid=0", "1 to 4294967294"),
        ("nvme+tcp://h/n?nsid=4294967295", "1 to 4294967294"),
        ("nvme+tcp://h/n?nsid=+1", "1 to 4294967294"),
        ("nvme+tcp://h/n?nsid=1&nsid=2", "two things"),
        ("nvme+tcp://h/n?uuid=0011", "32 hexadecimal digits"),
        (
            "nvme+tcp://h/n?nguid=00000000000000000000000000000000",
            "not all of them 0",
        ),
        (
            "nvme+tcp://h/n?eui64=00112233445566778",
            "16 hexadecimal digits",
        ),
        ("nvme+tcp://h/n?io-timeout=3", "says io-timeout"),
        ("nvme+tcp://h/n?io-timeout=3", "nvme-io-timeout"),
        ("nvme+tcp://h/n?NSID=1", "something unknown"),
        (
            "nvme+tcp://h/nqn.2014-08.org.nvmexpress.discovery?nsid=1",
            "virtioblkd nvme discover",
        ),
        (&many, "more than 16 addresses"),
        (&long, "more than 223 bytes"),
        (&longest, "longer than 8192 bytes"),
        (&host, "a host that is none"),
    ] {
        let error = text.parse::<Uri>().unwrap_err().to_string();
        assert!(error.contains(why), "{text}: {error}");
    }
    let error = "nvme+tcp://h/n?nsid=1".parse::<Allowed>().unwrap_err();
    assert!(
        error.to_string().contains("leave out the question mark"),
        "{error}"
    );
}

#[test]
fn a_secret_in_a_name_is_refused_and_not_repeated() {
    for text in [
        "nvme+tcp://h/n?nsid=1&dhchap-secret=DHHC-1:00:c2VjcmV0:",
        "nvme+tcp://h/n?tls-key=NVMeTLSkey-1:01:c2VjcmV0:",
        "nvme+tcp://DHHC-1:00:c2VjcmV0:@h/n?nsid=1",
    ] {
        let error = text.parse::<Uri>().unwrap_err().to_string();
        assert!(error.contains("nvme-dhchap-secret"), "{error}");
        assert!(!error.contains("c2VjcmV0"), "{error}");
    }
    // Nor is what only might be one.
    let error = "nvme+tcp://u:c2VjcmV0@h/n?nsid=1"
        .parse::<Uri>()
        .unwrap_err();
    assert!(!error.to_string().contains("c2VjcmV0"), "{error}");
    let error = "nvme+tcp://h/n?C2VjcmV0=1".parse::<Uri>().unwrap_err();
    assert!(!error.to_string().contains("C2Vj"), "{error}");
}

#[test]
fn every_address_of_a_name_has_to_be_allowed() {
    let allowed = |list: &[&str], text: &str| {
        let list: Vec<Allowed> = list.iter().map(|one| one.parse().unwrap()).collect();
        uri(text).is_allowed(&list)
    };
    let both = "nvme+tcp://a,b:1/n?nsid=1";
    assert!(allowed(&["nvme+tcp://a,b:1/n"], both));
    assert!(allowed(&["nvme+tcp://a:4420/n", "nvme+tcp://B:1"], both));
    assert!(allowed(&["nvme+tcp://a,b:1,c"], both));
    assert!(!allowed(&["nvme+tcp://a/n"], both));
    assert!(!allowed(&["nvme+tcp://a,b/n"], both), "another port");
    assert!(!allowed(&["nvme+tcp://a,b:1/m"], both), "another subsystem");
    assert!(!allowed(&[], both));
    // What an error tells to write is enough.
    assert!(allowed(&[&uri(both).needs().to_string()], both));
}
